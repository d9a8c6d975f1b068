"""Save, kill, resume equals not having stopped, bit for bit."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    FIRST,
    NARROW,
    SELECT,
    VISIT,
    Case,
    assert_identical,
    build,
    case_id,
    finish,
    forward_backward,
    run_steps,
    train,
)

SAVED_AT = 4
CASES = [
    *(Case(stage=stage, offload=offload, dtype=dtype, clip=0.3) for stage, offload, dtype in product(
        (1, 2), ("none", "cpu"), ("fp32", "bf16"))),
    Case(stage=3, dtype="bf16", clip=0.3, zero={"sub_group_size": 300}),
    Case(stage=3, offload="cpu", accumulation=2, zero={"stage3_param_persistence_threshold": 0}),
    Case(stage=3, offload="cpu", model="net", decay_groups=True, zero={"offload_param": {"device": "cpu"}}),
    Case(accumulation=3, decay_groups=True, offload="cpu"),
    Case(model="net", decay_groups=True),
    Case(config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}}}),
    Case(offload="cpu", config={"scheduler": {"type": "OneCycle", "params": {
        "cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3, "cycle_momentum": True}}}),
    Case(section={**SELECT, "policy": "cyclic"}),
    Case(section={**SELECT, **NARROW}, dtype="bf16", clip=0.3),
    Case(stage=3, section={**SELECT, **VISIT}, decay_groups=True, zero={"sub_group_size": 300}),
    Case(section={**FIRST, **VISIT, "keep_master": "accelerator"}, accumulation=2),
    Case(section={**SELECT, "policy": "gradient_topk", "always_select": ["final_norm"]}, offload="cpu"),
]  # fmt: skip
KINDS = ("between steps", "between planning and stepping")


def save_and_go_on(case: Case, directory: Path, kind: str) -> dict[str, Any]:
    """Train ``case`` to its end, saving on the way; what the steps after the save did."""
    engine = build(case)
    run_steps(engine, case, 0, SAVED_AT)
    if kind == "between steps":
        engine.save_checkpoint(str(directory))
        return finish(engine, run_steps(engine, case, SAVED_AT))
    for micro_step in range(case.accumulation):
        forward_backward(engine, case, SAVED_AT, micro_step)
        if micro_step == case.accumulation - 1:
            engine.save_checkpoint(str(directory))
        engine.step()
    return finish(engine, run_steps(engine, case, SAVED_AT + 1))


def resume(case: Case, directory: Path) -> dict[str, Any]:
    engine = build(case.but(seed=99))  # other weights: those of the checkpoint must replace them
    path, _ = engine.load_checkpoint(str(directory))
    if path is None:
        raise AssertionError(f"nothing was loaded from {directory}")
    return finish(engine, run_steps(engine, case, SAVED_AT))


def selected() -> list[Any]:
    """Every case in both kinds at 1 and 2 ranks; by default each case once, in turn as its kind, at 2 ranks, and each
    kind of each stage once at 1 rank."""
    by_default = {(index, KINDS[index % 2], 2) for index in range(len(CASES))}
    for stage, kind in product((1, 2, 3), KINDS):
        offload = ("none", "cpu")[(stage + KINDS.index(kind)) % 2]
        alike = [index for index, case in enumerate(CASES) if case.stage == stage and case.offload == offload]
        by_default.add((alike[-1], kind, 1))
    return [
        pytest.param(CASES[index], kind, ranks, marks=[] if (index, kind, ranks) in by_default else pytest.mark.slow)
        for index, kind, ranks in product(range(len(CASES)), KINDS, (1, 2))
    ]


def whole_and_saving(case: Case, directory: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(case), save_and_go_on(case, directory, kind)


@pytest.mark.parametrize(("case", "kind", "ranks"), selected(), ids=case_id)
def test_resume_is_bit_identical_to_not_stopping(workers, other_workers, tmp_path, case, kind, ranks):
    check_resume(workers, other_workers, tmp_path, case, kind, ranks)


def check_resume(workers: Any, other_workers: Any, directory: Path, case: Case, kind: str, ranks: int) -> None:
    """A run of ``case``, one that saved on the way, and one that went on from there in other processes are equal."""
    kept = ("weights", "partitions", "history", "counts", "plan", "blocks")
    together = workers(ranks).run(whole_and_saving, case, directory, kind)
    for (whole, saving), resumed in zip(together, other_workers(ranks).run(resume, case, directory), strict=True):
        expected = {key: whole[key] for key in kept}
        assert_identical(expected, {key: saving[key] for key in kept})
        assert_identical(expected, {key: resumed[key] for key in kept})
        steps = case.steps - SAVED_AT
        assert resumed["norms"] == whole["norms"][-steps:]
        assert resumed["lrs"] == whole["lrs"][-steps:]
        assert resumed["losses"] == whole["losses"][-steps * case.accumulation :]


def load_what_does_not_fit(directory: Path) -> dict[str, str]:
    """The errors met by loading a checkpoint of plain DeepSpeed, and one of other blocks."""
    case = Case(steps=2)
    plain = build(case.but(section=None))
    run_steps(plain, case)
    plain.save_checkpoint(str(directory / "plain"))
    plain.destroy()
    other = build(
        case.but(
            section={
                **SELECT,
                "blocks": {
                    "first": [r".*(embed|layers\.[01]\.).*"],
                    "rest": [r".*(layers\.[23]\.|\.norm\.).*"],
                },
            }
        )
    )
    run_steps(other, case)
    other.save_checkpoint(str(directory / "other"))
    other.destroy()
    errors = {}
    for name in ("plain", "other"):
        engine = build(case)
        before = {key: value.clone() for key, value in engine.module.state_dict().items()}
        try:
            engine.load_checkpoint(str(directory / name))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
        assert_identical(before, dict(engine.module.state_dict()))
        engine.load_checkpoint(str(directory / name), load_module_only=True)
        finish(engine, run_steps(engine, case))
    return errors


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(workers, tmp_path, ranks):
    for errors in workers(ranks).run(load_what_does_not_fit, tmp_path):
        assert errors["plain"].startswith("CheckpointError") and "plain DeepSpeed" in errors["plain"]
        assert errors["other"].startswith("CheckpointError") and "blocks" in errors["other"]


def saved_keys(case: Case, directory: Path) -> dict[str, Any]:
    """The keys of this rank's optimizer file after a step that left most blocks without state, and our own file."""
    engine = build(case)
    run_steps(engine, case, 0, 1)
    engine.save_checkpoint(str(directory), tag="here")
    rank = torch.distributed.get_rank()
    (file,) = (directory / "here").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    optimizer = torch.load(file, weights_only=False)["optimizer_state_dict"]
    counts = engine.selection.update_counts
    engine.destroy()
    del optimizer["param_slice_mappings"]  # which parameters this rank has slices of, in plain DeepSpeed too
    return {
        "keys": keys_of(optimizer),
        "states": len(optimizer["base_optimizer_state"]["state"]),
        "groups": len(optimizer["base_optimizer_state"]["param_groups"]),
        "empty": sum(
            int(state["step"]) == 0 and not state["exp_avg"].any() and state["exp_avg"].untyped_storage().nbytes() == 4
            for state in optimizer["base_optimizer_state"]["state"].values()
        ),
        "ours": json.loads((directory / "here" / "adagrad_select.json").read_text()),
        "counts": counts,
    }


def keys_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: keys_of(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [keys_of(inner) for inner in value]
    return type(value).__name__


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_checkpoints_have_the_same_keys_on_every_rank_and_our_part_is_json(workers, tmp_path, offload):
    """Also where a partition is empty on one rank; a block that was never updated has no state on any."""
    case = Case(model="net", decay_groups=True, offload=offload)
    first, second = workers(2).run(saved_keys, case, tmp_path)
    assert first["keys"] == second["keys"]
    assert first["states"] == first["groups"]
    assert 0 < first["empty"] < first["groups"]  # said to be zeros after 0 updates, in next to no room
    assert first["ours"]["update_counts"] == list(first["counts"])
