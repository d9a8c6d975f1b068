"""SparseGrad under ZeRO: K values a matrix are reduced, stepped, stored and saved; the matrices follow them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from reference_sparse import Entries, SparseReference
from support import (
    BETAS,
    DTYPES,
    EPS,
    LEARNING_RATE,
    VISIT,
    WEIGHT_DECAY,
    Case,
    assert_identical,
    batch,
    build,
    case_id,
    ds_config,
    finish,
    run_steps,
    tiny_model,
    train,
    weights,
    whole,
)
from torch import Tensor

import ds_agsel
from ds_agsel.config import parse_section
from ds_agsel.ds_config import DsConfig
from ds_agsel.entry.preparation import prepare
from ds_agsel.errors import ConfigError
from ds_agsel.sparse.linear import added_rows
from ds_agsel.zero.support import unsupported

CALIBRATION, REFRESH = 2, 4
SPARSE = {"entries_percent": 10.0, "calibration_steps": CALIBRATION, "refresh_steps": REFRESH, "lr_scale": 2.0}
EVERY = {"policy": "all", "sparse_grad": SPARSE}
SOME = {"policy": "random", "select_percent": 50, "seed": 1, "sparse_grad": SPARSE}


def entries_of(target: Any) -> Entries:
    support = target.support
    mask = torch.arange(support.widest) < support.lengths[:, None]
    return Entries(support.directions.double(), mask.double())


def with_choices(case: Case) -> dict[str, Any]:
    """A run, and the entries chosen after each step at which some were, with each target's orientation."""
    chosen: dict[int, dict[str, Entries]] = {}
    seen: dict[str, Any] = {}

    def look(event: str, engine: Any, step: int) -> None:
        if event == "step":
            for target in engine.optimizer.carriers._targets:
                if target.support is not seen.get(target.name):
                    seen[target.name] = target.support
                    chosen.setdefault(step, {})[target.name] = entries_of(target)

    engine = build(case)
    rows = {target.name: target.lines_are_rows for target in engine.optimizer.carriers._targets}
    result = run_steps(engine, case, observe=look)
    result["record"] = engine.selection.sparse
    return {**finish(engine, result), "chosen": chosen, "rows": rows}


def reference(case: Case, ranks: int, run: dict[str, Any]) -> dict[str, Tensor]:
    twin = SparseReference(
        tiny_model(case).double(), run["rows"], LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, SPARSE["lr_scale"]
    )
    for step in range(case.steps):
        if step >= CALIBRATION:
            micro_steps = range(case.accumulation)
            twin.step([batch(case, step, micro_step, rank) for micro_step in micro_steps for rank in range(ranks)])
        twin.restart(run["chosen"].get(step, {}))
    return {name: parameter.detach() for name, parameter in twin.parameters.items()}


TWINS = [
    Case(stage=stage, offload=offload, accumulation=accumulation, section=EVERY, steps=CALIBRATION + 2 * REFRESH + 1)
    for stage, offload, accumulation in product((1, 2, 3), ("none", "cpu"), (1, 2))
]
BY_DEFAULT = [(2, "none", 2, 2), (3, "cpu", 1, 2), (1, "cpu", 1, 1)]


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        pytest.param(
            case, ranks,
            marks=[] if (case.stage, case.offload, case.accumulation, ranks) in BY_DEFAULT else pytest.mark.slow,
        )
        for case, ranks in product(TWINS, (1, 2))
    ],
    ids=case_id,
)  # fmt: skip
def test_weights_follow_the_dense_twin_over_two_refreshes(workers, case, ranks):
    runs = workers(ranks).run(with_choices, case)
    run = runs[0]
    assert sorted(run["chosen"]) == [CALIBRATION - 1, CALIBRATION + REFRESH - 1, CALIBRATION + 2 * REFRESH - 1]
    assert run["skipped"] == CALIBRATION and run["counts"] == (case.steps - CALIBRATION,) * 6
    assert all(matrix.chosen == 3 for matrix in run["record"].matrices.values())
    assert run["record"].trained_fraction == 0.1 and 0.1 < run["record"].captured < 1
    wanted = reference(case, ranks, run)
    for other in runs:
        for name, value in wanted.items():
            torch.testing.assert_close(other["weights"][name].double(), value, atol=2e-4, rtol=2e-4, msg=name)


def added_by_rank(case: Case, target: Any, values: Tensor) -> Tensor:
    """What ``values`` add to the matrix, with ZeRO-3 each rank's rows by themselves: a product's last bit depends."""
    rows = target.shape[0] if case.stage < 3 else target.shape[0] // dist.get_world_size()
    slices = [slice(first, first + rows) for first in range(0, target.shape[0], rows)]
    return torch.cat([added_rows(values, target.support, each, target.lines_are_rows) for each in slices])


def put_together(case: Case) -> None:
    """Check at every step that each matrix is its base and what its values add, rounded once."""
    before: dict[str, Tensor] = {}

    def look(event: str, engine: Any, step: int) -> None:
        carriers = engine.optimizer.carriers
        state = carriers.state_dict()
        now = weights(engine)
        if event == "start":
            before.update(now)
        if event != "step":
            return
        selected = engine.selection.history[-1].blocks if step >= CALIBRATION else ()
        for target in carriers._targets:
            name, block = target.name, carriers._block_of[target.name]
            if block not in selected:
                assert torch.equal(now[name], before[name]), name
            if target.support is not None:
                added = added_by_rank(case, target, state["values"][name])
                base = state["base"][name].view(target.shape)
                assert torch.equal(now[name], (base.float() + added).to(base.dtype)), name
                if carriers._section.rotation == "none":
                    assert torch.equal(now[name][added == 0], base[added == 0])
        assert any(not torch.equal(now[name], before[name]) for name in state["base"]) == bool(selected)
        if selected and case.zero.get("stage3_param_persistence_threshold") == 0:
            written = [t for t in carriers._targets if carriers._block_of[t.name] in selected]
            padded = sum(t.entries + t.entries % 2 for t in written)
            assert engine.selection.traffic[-1].gathered_bytes == padded * DTYPES[case.dtype].itemsize

    train(case, observe=look)


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=2, dtype="bf16", section=SOME),
        Case(stage=3, dtype="bf16", section=SOME, zero={"stage3_param_persistence_threshold": 0}),
        Case(stage=2, section={**SOME, **VISIT, "sparse_grad": {**SPARSE, "rotation": "none", "choice": "random"}}),
        pytest.param(Case(stage=3, section={**SOME, "sparse_grad": {**SPARSE, "rotation": "both"}}),
                     marks=pytest.mark.slow),
    ],
    ids=case_id,
)  # fmt: skip
def test_matrices_are_their_base_and_their_values_and_those_of_unselected_blocks_stand(workers, case):
    workers(2).run(put_together, case)


def without_decay(case: Case, first: int) -> dict[str, Tensor]:
    """The weights after steps ``first`` and on, by ds_agsel or, without a section, plain DeepSpeed."""
    model = tiny_model(case)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    initialize = deepspeed.initialize if case.section is None else ds_agsel.initialize
    engine = initialize(model=model, model_parameters=groups, config=ds_config(case))[0]
    run_steps(engine, case, first)
    found = weights(engine)
    engine.destroy()
    return found


def test_all_entries_without_a_rotation_are_dense_adamw_without_decay(workers):
    sparse = {
        "entries_percent": 100,
        "rotation": "none",
        "lr_scale": 1.0,
        "calibration_steps": 1,
        "refresh_steps": None,
    }
    section = {"policy": "all", "sparse_grad": sparse}
    ours = workers(1).run(without_decay, Case(section=section, steps=5), 0)[0]
    dense = workers(1).run(without_decay, Case(section=None, steps=5), 1)[0]  # step 0 is the other's calibration
    for name, value in dense.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)


def tensors_called(name: str, tree: Any) -> list[Tensor]:
    """All tensors under the key ``name`` of nested dicts and lists."""
    if isinstance(tree, dict):
        own = [value for key, value in tree.items() if key == name and isinstance(value, Tensor)]
        return own + tensors_called(name, list(tree.values()))
    if isinstance(tree, (list, tuple)):
        return [found for member in tree for found in tensors_called(name, member)]
    return []


def held(case: Case, directory: Path) -> dict[str, Any]:
    """The bytes of states, and the files' shapes of them."""
    engine = build(case)
    run_steps(engine, case)
    dense = sum(p.numel() for n, p in engine.module.named_parameters() if p.requires_grad and "sparse_grad" not in n)
    entries = sum(matrix.entries for matrix in engine.selection.sparse.matrices.values())
    result = {"bytes": engine.optimizer.state_bytes(), "dense": dense, "entries": entries}
    engine.save_checkpoint(str(directory), tag="t")
    (file,) = (directory / "t").glob("*optim_states.pt")
    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
    result["in file"] = sum(map(torch.numel, tensors_called("exp_avg", saved)))
    result["names"] = list(engine.module.state_dict())
    engine.module.save_pretrained(directory / "hf")
    result["weights"] = weights(engine)
    engine.destroy()
    return result


def test_states_are_of_the_entries_alone_and_a_saved_model_has_no_key_of_ours(workers, tmp_path):
    from transformers import AutoModelForCausalLM

    case = Case(section=EVERY, steps=CALIBRATION + 2)
    found = workers(1).run(held, case, tmp_path)[0]
    every = sum(parameter.numel() for parameter in tiny_model(case).parameters())
    assert found["dense"] + 12 * 320 == every  # the twelve matrices of 16 x 20 are not among them
    assert found["entries"] == 12 * 32
    assert found["bytes"] == 8 * (found["dense"] + found["entries"])
    assert found["in file"] == found["dense"] + found["entries"]
    assert not [name for name in found["names"] if "sparse_grad" in name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, value in found["weights"].items():
        if "sparse_grad" not in name:
            assert torch.equal(loaded[name], value), name


RESUMED = [
    Case(stage=2, offload="cpu", dtype="bf16", section=SOME, steps=12),
    Case(stage=3, section=SOME, steps=12, zero={"stage3_param_persistence_threshold": 0}),
    pytest.param(Case(stage=1, section={**SOME, **VISIT}, steps=12), marks=pytest.mark.slow),
]


def saved_at_each(case: Case, directory: Path) -> dict[str, Any]:
    engine = build(case)

    def save(event: str, engine: Any, step: int) -> None:
        if event == "step":
            engine.save_checkpoint(str(directory), tag=f"after{step}")

    return finish(engine, run_steps(engine, case, observe=save))


def resumed_after(case: Case, directory: Path, step: int) -> dict[str, Any]:
    engine = build(case.but(seed=99))
    engine.load_checkpoint(str(directory), tag=f"after{step}")
    return finish(engine, run_steps(engine, case, step + 1))


@pytest.mark.parametrize("case", RESUMED, ids=case_id)
def test_a_resume_in_calibration_and_around_a_refresh_is_bit_for_bit(workers, other_workers, tmp_path, case):
    unbroken = workers(2).run(saved_at_each, case, tmp_path)
    for step in (0, CALIBRATION - 1, 5, 7, 9):
        for one, other in zip(unbroken, other_workers(2).run(resumed_after, case, tmp_path, step)):
            for key in ("weights", "partitions", "counts", "plan"):
                assert_identical(one[key], other[key])


def test_a_resume_on_one_rank_has_the_same_matrices(workers, tmp_path):
    case = Case(stage=3, section=SOME, steps=7)
    two = workers(2).run(saved_at_each, case, tmp_path)[0]
    one = workers(1).run(resumed_after, case, tmp_path, case.steps - 1)[0]
    for name, value in two["weights"].items():  # a product of other rows may differ in a matrix's last bit
        exact = not name.endswith("proj.weight")
        torch.testing.assert_close(one["weights"][name], value, atol=0 if exact else 1e-6, rtol=0 if exact else 1e-5)
    assert (two["counts"], two["plan"]) == (one["counts"], one["plan"])


def resumed_with(case: Case, directory: Path, step: int, changes: dict[str, Any]) -> list[Any]:
    """Whether a resumed run is calibrating, how many steps it then counts, and how often entries were chosen."""
    changed = case.but(section={**case.section, "sparse_grad": {**SPARSE, **changes}})
    engine = build(changed)
    engine.load_checkpoint(str(directory), tag=f"after{step}")
    carriers, before = engine.optimizer.carriers, engine.selection.num_steps
    was = carriers.is_calibrating, engine.selection.sparse.calibration_left
    run_steps(engine, changed, step + 1, step + 2)
    chosen = {matrix.chosen for matrix in engine.selection.sparse.matrices.values()}
    counted = engine.selection.num_steps - before
    engine.destroy()
    return [*was, counted, chosen]


def test_a_resume_with_other_clocks_neither_calibrates_again_nor_misses_a_refresh(workers, tmp_path):
    case = Case(section=EVERY, steps=6)
    workers(1).run(saved_at_each, case, tmp_path)
    [found] = workers(1).run(resumed_with, case, tmp_path, 4, {"calibration_steps": 9})
    assert found == [False, 0, 1, {2}]
    [found] = workers(1).run(resumed_with, case, tmp_path, 4, {"refresh_steps": 2})  # 3 updates are loaded
    assert found == [False, 0, 1, {2}]


def small_updates(case: Case) -> list[float]:
    """How far each matrix has moved, over how far its values say."""
    engine = build(case)
    start = {t.name: whole(t.weight).detach().clone().float() for t in engine.optimizer.carriers._targets}
    run_steps(engine, case)
    moved = []
    for target in engine.optimizer.carriers._targets:
        wanted = added_rows(target.carrier.detach(), target.support, slice(None), target.lines_are_rows)
        moved.append(float((target.weight.float() - start[target.name]).norm() / wanted.norm()))
    engine.destroy()
    return moved


def test_updates_smaller_than_a_weight_s_last_bit_add_up(workers):
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}
    section = {"policy": "all", "sparse_grad": {**SPARSE, "refresh_steps": None, "lr_scale": None}}
    ratios = workers(1).run(small_updates, Case(dtype="bf16", section=section, config=config, steps=42))[0]
    assert all(0.3 < ratio < 3 for ratio in ratios), ratios


def loads_weights_alone(case: Case, directory: Path) -> list[Any]:
    engine = build(case)
    run_steps(engine, case)
    engine.save_checkpoint(str(directory))
    before = weights(engine)
    again = build(case)
    again.load_checkpoint(str(directory), load_module_only=True)
    carriers = again.optimizer.carriers
    fresh = [carriers.is_calibrating, again.selection.sparse.captured]
    after = weights(again)
    run_steps(again, case)
    matrices = [name for name in before if ".mlp." in name and name.endswith("weight")]
    return [*fresh, all(torch.equal(before[name], after[name]) for name in matrices), again.selection.num_steps]


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_loaded_alone_are_calibrated_anew(workers, tmp_path, stage):
    case = Case(stage=stage, section=EVERY, steps=CALIBRATION + 2)
    assert workers(2).run(loads_weights_alone, case, tmp_path)[0] == [True, None, True, 2]


def consolidated(case: Case) -> tuple[list[str], list[str], str]:
    """Names in the whole 16-bit state dict, the model's own, and what compile() says."""
    engine = build(case)
    names = list(engine._zero3_consolidated_16bit_state_dict())
    own = [name for name, _ in tiny_model(case).named_parameters()]
    with pytest.raises(ConfigError) as caught:
        engine.compile()
    engine.destroy()
    return names, own, str(caught.value)


def test_weights_put_together_for_a_file_have_no_key_of_ours_and_compile_is_refused(workers):
    [(names, own, refusal)] = workers(1).run(consolidated, Case(stage=3, section=EVERY, tied=False))
    assert sorted(names) == sorted(own)
    assert "engine.compile() can't be used with adagrad_select.sparse_grad" in refusal


def test_a_failed_initialize_leaves_the_model_as_it_was():
    def names_of(model: Any) -> list[tuple[str, bool]]:
        return [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]

    model = tiny_model(Case())
    before = names_of(model)
    section = {"always_select": ["nothing"], "sparse_grad": {}}
    with pytest.raises(ConfigError, match="always_select"):
        prepare(model, parse_section(section), None, None, 1)
    assert names_of(model) == before
    prepare(model, parse_section({"sparse_grad": {}}), None, None, 1)
    assert names_of(model) != before
    prepare(model, parse_section({}), None, None, 1)  # another engine, without it, takes the model over
    assert names_of(model) == before


@pytest.mark.parametrize("name", ["offload_param", "offload_optimizer"])
def test_nvme_is_refused_by_name(name):
    ds = DsConfig.of({"zero_optimization": {"stage": 3, name: {"device": "nvme", "nvme_path": "/nvme"}}})
    found = [line for line in unsupported(ds, parse_section(EVERY)) if "sparse_grad" in line]
    assert len(found) == 1 and f"zero_optimization.{name}.device='nvme'" in found[0]
