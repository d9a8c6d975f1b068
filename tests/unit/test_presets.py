"""Presets fill what the user leaves out, fit any model, and say what they mean."""

from __future__ import annotations

import json
import logging
import re
import typing
from pathlib import Path

import pytest

from ds_agsel import cli
from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig, parse_section
from ds_agsel.entry.check import problems_of
from ds_agsel.errors import ConfigError
from ds_agsel.lottery import build_lottery
from ds_agsel.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
SOUND = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


def blocks_of(num_layers: int, head: bool) -> tuple[Block, ...]:
    names = [
        "embedding",
        *(f"layers.{index}" for index in range(num_layers)),
        "final_norm",
        *(["head"] if head else []),
    ]
    return tuple(Block(index, name, (f"{name}.weight",), 10) for index, name in enumerate(names))


def test_the_section_names_the_presets_of_the_table() -> None:
    (names, _) = typing.get_args(SelectionConfig.model_fields["preset"].annotation)
    assert set(typing.get_args(names)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_fields_and_the_defaults_of_the_others(name: str) -> None:
    config = parse_section({"preset": name})
    spelt_out = parse_section({key: list(v) if isinstance(v, tuple) else v for key, v in PRESETS[name].items()})
    assert config == spelt_out.model_copy(update={"preset": name})
    assert parse_section(config.model_dump(mode="json")) == config  # as a checkpoint keeps it
    assert problems_of({**SOUND, "adagrad_select": {"preset": name}}) == []


_DOCUMENTED = {  # preset -> cells of docs/policies.md's table
    cells[0].split("`")[1]: cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "policies.md").read_text().partition("\n## Presets\n")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    )
}
_OUTSIDE = "embedding, final norm and head "  # always or never


def fields_of(cells: list[str]) -> dict[str, object]:
    """The fields that a row of docs/policies.md's table stands for."""
    policy, unit, share, stands_for, on_reentry, others = cells
    fields: dict[str, object] = {
        "policy": policy.strip("`"),
        "granularity": unit,
        "select_percent": float(share.split(" %")[0]),
        "select_every": int(stands_for.split(" step")[0]),
        "on_reentry": on_reentry,
    }
    for other in re.split("; |, (?=`)", others.split(": ")[0]):
        if other.startswith(_OUTSIDE):
            fields[f"{other.removeprefix(_OUTSIDE)}_select"] = ("embedding", "final_norm", "head")
        else:
            name, value = other.removeprefix("`").split("` ")
            fields[name] = float(value) if value[0].isdigit() else value
    return fields


def test_the_documents_have_every_preset() -> None:
    assert list(_DOCUMENTED) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_documented_row_says(name: str) -> None:
    assert fields_of(_DOCUMENTED[name]) == PRESETS[name]


@pytest.mark.parametrize(("name", "layers", "drawn"), [("badam", 22, 1), ("lisa", 25, 2), ("lisa", 37, 2)])
def test_a_share_is_of_the_layers_that_the_documents_say(name: str, layers: int, drawn: int) -> None:
    assert {"badam": "one layer", "lisa": "two of 25 to 37 layers"}[name] in _DOCUMENTED[name][2]
    assert build_lottery(blocks_of(layers, False), parse_section({"preset": name})).num_selected == drawn


def test_the_adagrad_select_preset_is_the_default_section() -> None:
    assert parse_section({"preset": "adagrad_select"}).model_copy(update={"preset": None}) == SelectionConfig()


def test_fields_of_the_user_win_and_null_leaves_them_to_the_preset() -> None:
    config = parse_section({"preset": "lisa", "select_percent": 30, "select_every": None, "policy": "cyclic"})
    assert (config.policy, config.select_percent, config.select_every) == ("cyclic", 30, 20)
    assert not config.is_preset("select_percent") and config.is_preset("select_every")
    config = parse_section({"preset": "lisa", "never_select": ["embedding"]})
    assert config.always_select == ("final_norm", "head") and config.is_preset("always_select")
    assert parse_section({"preset": "badam", "always_select": ["head"]}).never_select == ("embedding", "final_norm")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    ("name", "layers", "drawn"), [("badam", 30, 1), ("lisa", 30, 2), ("lisa", 4, 1), ("grass", 30, 6)]
)
def test_presets_fit_models_with_a_tied_head_and_few_layers(
    name: str, layers: int, drawn: int, head: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        lottery = build_lottery(blocks_of(layers, head), parse_section({"preset": name}))
    assert not caplog.records
    outside = (0, layers + 1, layers + 2)[: 2 + head]
    assert (lottery.num_selected, lottery.drawn) == (drawn, tuple(range(1, layers + 1)))
    assert (lottery.always if name == "lisa" else lottery.never) == outside


def test_a_name_of_the_user_s_own_must_still_be_a_block() -> None:
    with pytest.raises(ConfigError, match="never_select"):
        build_lottery(blocks_of(4, False), parse_section({"preset": "badam", "never_select": ["embedding", "haed"]}))


def test_an_error_about_a_field_that_the_preset_has_set_says_so() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section({"preset": "misa", "policy": "replay", "replay_file": "x"})
    assert str(caught.value).endswith(' The preset "misa" sets select_every=50; set it yourself to change it.')


def test_check_prints_what_a_preset_means_field_by_field(tmp_path, capsys) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({**SOUND, "adagrad_select": {"preset": "grass", "select_every": 7}}))
    assert cli.main(["check", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    start = printed.index('preset "grass" means:')
    fields = printed[start + 1 : start + 1 + len(PRESETS["grass"])]
    assert [line.split('"')[1] for line in fields] == list(PRESETS["grass"])
    assert '  "select_every": 7 (yours; the preset has 20)' in fields
    assert '  "never_select": ["embedding", "final_norm", "head"]' in fields


def test_check_counts_a_preset_s_blocks_of_a_model_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        assert problems_of({**SOUND, "adagrad_select": {"preset": "badam"}}) == []
        assert not caplog.records
        problems_of({**SOUND, "adagrad_select": {"select_percent": 1}}, None)
    assert "select_percent=1" in caplog.text
