"""Checkpoints that travel: to another rank count, to fp32 weights, to DeepSpeed's universal form and back."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    SELECT,
    Case,
    assemble,
    assert_identical,
    build,
    finish,
    needs_nvme,
    nvme_lacks,
    observe_state,
    run_steps,
    train,
)

SAVED_AT = 4
CASES = {
    "stage 1": Case(stage=1),
    "stage 2, bf16, offload": Case(offload="cpu", dtype="bf16", clip=0.3),
    "uneven": Case(model="net", decay_groups=True, offload="cpu"),
    "round robin": Case(zero={"round_robin_gradients": True, "contiguous_gradients": True}, tied=False),
    "visiting": Case(section={**SELECT, "step_device": "accelerator"}),
    "stage 3, visiting": Case(model="net", stage=3, section={**SELECT, "step_device": "accelerator"}),
    "stage 3": Case(stage=3, zero={"stage3_param_persistence_threshold": 0}),
    "stage 3, uneven": Case(model="net", stage=3, offload="cpu", decay_groups=True, dtype="bf16"),
    "schedule": Case(config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}}}, steps=6),
}
if not nvme_lacks():
    CASES["stage 3, NVMe"] = Case(model="net", stage=3, offload="nvme", decay_groups=True)
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def full_state(observed: list[dict[str, Any]]) -> dict[str, Any]:
    """By parameter name: weights, masters, moments, step counts; and the selection's."""
    steps = {name: group["step"] for group in observed[0]["partitions"] for name in group["shapes"]}
    return {**assemble(observed), "steps": steps, "counts": observed[0]["counts"], "plan": observed[0]["plan"]}


def save(case: Case, directory: Path) -> dict[str, Any]:
    engine = build(case)
    run_steps(engine, case, 0, SAVED_AT)
    engine.save_checkpoint(str(directory), client_state={"mine": 1})
    return observe_and_end(engine)


def load(case: Case, directory: Path) -> dict[str, Any]:
    """What is there after the load; the run then goes on to its end."""
    engine = build(case.but(seed=99))  # other weights: those of the checkpoint must replace them
    path, client_state = engine.load_checkpoint(str(directory))
    assert path is not None and client_state["mine"] == 1 and "adagrad_select" not in client_state
    seen = observe_state("step", engine, engine.global_steps - 1)
    seen["lrs"] = [group["lr"] for group in engine.optimizer.param_groups]
    seen["state_bytes"] = engine.optimizer.state_bytes()
    return {**finish(engine, run_steps(engine, case, SAVED_AT)), "loaded": seen}


def observe_and_end(engine: Any) -> dict[str, Any]:
    seen = observe_state("step", engine, engine.global_steps - 1)
    seen["lrs"] = [group["lr"] for group in engine.optimizer.param_groups]
    seen["state_bytes"] = engine.optimizer.state_bytes()
    engine.destroy()
    return seen


def save_all(directory: Path) -> dict[str, Any]:
    return {name: save(case, directory / name) for name, case in CASES.items()}


def load_all(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    cases = {name: case.but(config={**case.config, **config}) for name, case in CASES.items()}
    return {name: load(case, directory / name) for name, case in cases.items()}


def train_all(names: list[str]) -> dict[str, Any]:
    return {name: train(CASES[name]) for name in names}


@pytest.fixture(scope="module")
def saved(workers, tmp_path_factory):
    """World size -> (folder of the checkpoints, case name -> what each rank had when it saved)."""
    found = {}
    for world_size in (1, 2):
        directory = tmp_path_factory.mktemp(f"saved_by_{world_size}")
        of_ranks = workers(world_size).run(save_all, directory, timeout_seconds=300)
        found[world_size] = directory, {name: [rank[name] for rank in of_ranks] for name in CASES}
    return found


@pytest.fixture(scope="module")
def universal(saved, tmp_path_factory):
    """World size that saved -> folder of the universal checkpoints, made by DeepSpeed's own converter."""
    from deepspeed.checkpoint import ds_to_universal

    found = {}
    for world_size, (directory, _) in saved.items():
        found[world_size] = tmp_path_factory.mktemp(f"universal_of_{world_size}")
        for name in CASES:
            options = argparse.Namespace(
                input_folder=str(directory / name / f"global_step{SAVED_AT}"),
                output_folder=str(found[world_size] / name / "converted"),
                num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
                inject_missing_state=False,
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                ds_to_universal.main(options)
    return found


def check_loaded(
    of_ranks: list[dict[str, Any]], saved_by: dict[str, list[dict[str, Any]]], first_record: int = 0
) -> None:
    """``first_record``: a universal checkpoint has the counts and no history."""
    for name, case in CASES.items():
        loaded = [rank[name]["loaded"] for rank in of_ranks]
        assert_identical(full_state(saved_by[name]), full_state(loaded))
        assert loaded[0]["lrs"] == saved_by[name][0]["lrs"]
        assert loaded[0]["counts"] == saved_by[name][0]["counts"] and 0 in loaded[0]["counts"]
        states = [state for rank in saved_by[name] for state in rank["partitions"] if state["step"]]
        assert len(states) < len(saved_by[name]) * len(saved_by[name][0]["partitions"])
        assert [record[0] for record in of_ranks[0][name]["history"]] == list(range(first_record, case.steps))


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (1, 2)])
def test_another_rank_count_goes_on_from_the_same_state(workers, saved, saved_by, loaded_by):
    directory, states = saved[saved_by]
    check_loaded(workers(loaded_by).run(load_all, directory, {}, timeout_seconds=300), states)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (1, 2), (2, 2)])
def test_a_universal_checkpoint_loads_back_with_the_selection(workers, saved, universal, saved_by, loaded_by):
    of_ranks = workers(loaded_by).run(load_all, universal[saved_by], UNIVERSAL, timeout_seconds=300)
    check_loaded(of_ranks, saved[saved_by][1], first_record=SAVED_AT)
    if saved_by == loaded_by:
        names = ["stage 1", "stage 2, bf16, offload", "uneven"]
        for whole, resumed in zip(workers(loaded_by).run(train_all, names), of_ranks, strict=True):
            for name in names:
                for key in ("weights", "partitions", "counts", "plan"):
                    assert_identical(whole[name][key], resumed[name][key])
                assert_identical(whole[name]["history"][SAVED_AT:], resumed[name]["history"])


@needs_nvme()
def test_states_on_nvme_are_among_them(saved):
    assert "stage 3, NVMe" in saved[1][1] and "stage 3, NVMe" in saved[2][1]


def test_states_exist_for_updated_blocks_alone_after_a_load(workers, saved):
    directory, states = saved[1]
    (same,) = workers(1).run(load_all, directory, {}, timeout_seconds=300)
    for name in CASES:
        assert same[name]["loaded"]["state_bytes"] == states[name][0]["state_bytes"] > 0


@pytest.mark.parametrize("saved_by", [1, 2])
def test_zero_to_fp32_gives_the_masters(saved, saved_by):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    directory, states = saved[saved_by]
    for name in CASES:
        with contextlib.redirect_stdout(io.StringIO()):
            fp32 = get_fp32_state_dict_from_zero_checkpoint(str(directory / name), f"global_step{SAVED_AT}")
        masters = full_state(states[name])["masters"]
        assert_identical(masters, {key: fp32[key].clone() for key in masters})


def what_is_refused(directory: Path, universal: Path) -> list[str]:
    """Messages of a universal load of what is none, of a plain load of what is one, and of another stage's."""
    import json

    from ds_agsel.errors import CheckpointError

    case, found = CASES["stage 1"], []
    other = directory / "another stage"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(directory / "stage 1", other)
        path = other / f"global_step{SAVED_AT}" / "manifest.json"
        content = json.loads(path.read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        from ds_agsel import checkpoints

        checkpoints.write_manifest(path.parent, files, {"stage": 3})
    torch.distributed.barrier()
    for place, tag, config in (
        (directory / "stage 1", f"global_step{SAVED_AT}", UNIVERSAL), (universal / "stage 1", "converted", {}),
        (other, None, {}), (universal / "nothing", None, UNIVERSAL),
    ):  # fmt: skip
        engine = build(case.but(config=config))
        before = {key: value.clone() for key, value in engine.module.state_dict().items()}
        try:
            found.append(repr(engine.load_checkpoint(str(place), tag)))
        except CheckpointError as error:
            found.append(str(error))
        assert_identical(before, dict(engine.module.state_dict()))
        engine.destroy()
    return found


def test_what_can_not_be_loaded_is_refused_by_name(workers, saved, universal):
    for no_universal, no_plain, other_stage, nothing in workers(2).run(what_is_refused, saved[2][0], universal[2]):
        assert "it is no universal checkpoint. Make one" in no_universal
        assert "is a universal checkpoint. Set checkpoint.load_universal=true" in no_plain
        assert "saved with zero_optimization.stage=3" in other_stage and "universal" in other_stage
        assert nothing == "(None, None)"


def load_across_stages(universal: Path) -> list[dict[str, Any]]:
    """What stages 3 and 2 make of universal checkpoints of stages 1 and 3."""
    to_3 = CASES["stage 1"].but(stage=3, config=UNIVERSAL)
    to_2 = CASES["stage 3, uneven"].but(stage=2, config=UNIVERSAL)
    return [load(to_3, universal / "stage 1"), load(to_2, universal / "stage 3, uneven")]


def test_a_universal_checkpoint_loads_into_another_stage(workers, saved, universal):
    of_ranks = workers(1).run(load_across_stages, universal[2])
    for index, name in enumerate(("stage 1", "stage 3, uneven")):
        expected, found = full_state(saved[2][1][name]), full_state([rank[index]["loaded"] for rank in of_ranks])
        assert_identical(expected, found)
        assert of_ranks[0][index]["loaded"]["lrs"] == saved[2][1][name][0]["lrs"]
