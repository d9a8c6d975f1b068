"""The sub-section `sparse_grad`: fields, refusals, and what an older checkpoint's lacks."""

from __future__ import annotations

from test_config import refusal

from ds_agsel.config import parse_section, with_defaults


def test_a_saved_section_gets_the_defaults_of_fields_that_are_newer() -> None:
    section = parse_section({"sparse_grad": {"entries_percent": 2}})
    saved = section.model_dump(mode="json")
    del saved["select_every"], saved["sparse_grad"]["choice"]
    assert with_defaults(saved) == section.model_dump(mode="json")


def test_the_sub_section_sparse_grad() -> None:
    read = parse_section({"sparse_grad": {"entries_percent": 2, "modules": ["a"], "refresh_steps": None}}).sparse_grad
    assert read is not None and (read.entries_percent, read.modules, read.refresh_steps) == (2.0, ("a",), None)
    assert parse_section({"sparse_grad": {"refresh_steps": "auto"}}).sparse_grad.refresh_steps == 50
    path = "adagrad_select.sparse_grad"
    assert refusal(sparse_grad={"entries": 1}).startswith(f'{path} has no field "entries".')
    assert refusal(sparse_grad={"entries_percent": 0}).startswith(f"{path}.entries_percent=0 is outside (0, 100].")
    assert refusal(sparse_grad={"rotation": "left"}).startswith(f'{path}.rotation="left" is not "model", "both" or')
    assert refusal(sparse_grad={"modules": "a"}).startswith(f'{path}.modules="a" is not a list of regular expressions')
    assert "not a regular expression" in refusal(sparse_grad={"modules": ["("]})
    assert "Set refresh_steps to null" in refusal(sparse_grad={"basis": "kind"})
    assert refusal(sparse_grad={"choice": "top"}).startswith(f'{path}.choice="top" is not "energy" or "random".')
    assert 'Set rotation to "none"' in refusal(sparse_grad={"choice": "random"})
    assert refusal(sparse_grad=True).startswith("adagrad_select.sparse_grad=true is not an object")
    assert "exclude each other" in refusal(sparse_grad={}, granularity="module")
