"""Saves and loads by several ranks: none touches what another still reads, all fail alike, and no file runs code."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support import SELECT, Case, assert_identical, build, partitions, run_steps, tiny_model, weights

from ds_agsel import checkpoints, policies
from ds_agsel.errors import CheckpointError
from ds_agsel.policies import registry
from ds_agsel.tag_owner import Run
from ds_agsel.zero import checkpointing, tag_files

CASE = Case(steps=4)


def rank() -> int:
    return torch.distributed.get_rank()


def wait_for(path: Path) -> None:
    """Until another rank has made ``path``."""
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"{path} did not come")
        time.sleep(0.001)


def state(engine: Any) -> dict[str, Any]:
    return {"weights": weights(engine), "partitions": partitions(engine), "selection": engine.selection.state_dict()}


# --------------------------------------------------------------- one rank is slower


def load_then_save(directory: Path) -> tuple[list[bool], list[str]]:
    """Rank 1 reads its shard once rank 0 is in its next save. Whether that reading had ended each time rank 0 made
    room, and what is wrong with the tag afterwards."""
    engine = build(CASE)
    run_steps(engine, CASE, 0, 1)
    engine.save_checkpoint(str(directory), "last")
    saves, has_loaded, found = directory / "saves", directory / "has_loaded", []
    read, make_room = engine._get_all_zero_checkpoint_state_dicts, checkpoints.make_room

    def read_late(*args: Any) -> Any:
        if rank() == 1:
            wait_for(saves)
        return read(*args)

    def observed(*args: Any) -> None:
        found.append(has_loaded.exists())
        make_room(*args)

    with mock.patch.object(engine, "_get_all_zero_checkpoint_state_dicts", read_late):
        engine.load_checkpoint(str(directory), "last")
    (has_loaded if rank() == 1 else saves).touch()
    with mock.patch.object(checkpoints, "make_room", observed):
        engine.save_checkpoint(str(directory), "last")
    engine.destroy()
    return found, checkpoints.problems(directory / "last")


def test_a_save_waits_until_every_rank_has_read_what_it_replaces(workers, tmp_path):
    (first, problems), (second, _) = workers(2).run(load_then_save, tmp_path)
    assert (first, second, problems) == ([True], [], [])


# ----------------------------------------------------------------- all fail alike


class Unpicklable:
    def __reduce__(self) -> Any:
        raise LookupError("this can't be saved")


def fails_on(failing: int, target: Any, name: str) -> contextlib.AbstractContextManager[Any]:
    """One rank alone meets an error of no expected kind as DeepSpeed puts a file together."""
    broken = mock.patch.object(target, name, side_effect=LookupError("of this rank"))
    return broken if rank() == failing else contextlib.nullcontext()


def failing_saves(case: Case, directory: Path) -> dict[str, Any]:
    """Saves over a whole tag that fail for reasons other than the disk; the messages, and what is there after each."""
    engine = build(case)
    run_steps(engine, case, 0, 1)
    engine.save_checkpoint(str(directory), "last", client_state={"saved": 1})
    found = {}
    wrong_state = mock.patch.object(engine.selection.policy, "state_dict", lambda: {"seen": np.float32(1)})
    reads_back_wrong = mock.patch.object(
        checkpoints, "problems", lambda *args: ["a shard has changed"] if rank() == 0 else []
    )
    for name, client_state, condition, options in (
        ("lambda", {"f": lambda: 0}, contextlib.nullcontext(), {}),
        ("no OSError", {"f": Unpicklable()}, contextlib.nullcontext(), {}),
        ("numpy", {}, wrong_state, {}),
        ("rank 0", {}, fails_on(0, engine, "_common_checkpoint_state"), {}),
        ("rank 1", {}, fails_on(1, engine.optimizer, "state_dict"), {}),
        ("reads back", {}, reads_back_wrong, {"keep": 2}),
    ):
        if name == "rank 1" and torch.distributed.get_world_size() == 1:
            continue
        message = None
        try:
            with condition:
                engine.save_checkpoint(str(directory), "last", client_state=client_state, **options)
        except CheckpointError as error:
            message = str(error)
        folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
        found[name] = (message, folders, checkpoints.problems(directory / "last"))
        torch.distributed.barrier()
    run_steps(engine, case, 1, 2)
    engine.save_checkpoint(str(directory), "last", keep=2)
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 2), (2, 1)])
def test_a_save_that_fails_fails_on_every_rank_and_the_old_tag_is_back(workers, tmp_path, stage, ranks):
    why = {
        "lambda": "lambda", "no OSError": "LookupError: this can't be saved", "rank 0": "LookupError: of this rank",
        "numpy": r"policy='adagrad_select': its state_dict() may hold", "rank 1": "LookupError: of this rank",
        "reads back": "it reads back wrong: a shard has changed",
    }  # fmt: skip
    for found in workers(ranks).run(failing_saves, Case(stage=stage, steps=4), tmp_path):
        for name, (message, folders, problems) in found.items():
            assert message is not None and "last could not be written" in message and why[name] in message, name
            assert (folders, problems) == (["last"], []), name
        assert len(found) == 4 + ranks
    assert checkpoints.newest_whole(tmp_path) == ("last", {})


def order_of_a_save(directory: Path) -> list[str]:
    engine = build(CASE)
    run_steps(engine, CASE, 0, 1)
    calls: list[str] = []
    names = ("make_room", "entries", "write_manifest", "problems", "write_latest", "settle", "prune")

    def recorded(name: str, call: Any) -> Any:
        return lambda *args: (calls.append(name), call(*args))[1]

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(checkpoints, name, recorded(name, getattr(checkpoints, name))))
        engine.save_checkpoint(str(directory), keep=1)
    engine.destroy()
    return calls


def test_a_save_verifies_before_it_settles_and_prunes_last(workers, tmp_path):
    leader, other = workers(2).run(order_of_a_save, tmp_path)
    assert leader == ["make_room", "entries", "write_manifest", "problems", "write_latest", "settle", "prune"]
    assert other == ["entries", "problems"]


# --------------------------------------------------------------- no file runs code


class Evil:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return run, (str(self._target),)


def run(target: str) -> None:
    """What a file must not call."""
    Path(target).touch()


def load_evil(stage: int, directory: Path) -> dict[str, str]:
    """What loading says of a tag whose files call a function, with a manifest that fits; nothing may be loaded."""
    case, found = CASE.but(stage=stage), {}
    engine = build(case)
    run_steps(engine, case, 0, 1)
    for name in ("optim_states", "model_states", "extra"):
        engine.save_checkpoint(str(directory), name, client_state={"numpy": np.arange(3), "best": np.float64(0.5)})
    run_steps(engine, case, 1, 2)
    before = state(engine)
    for name in ("optim_states", "model_states", "extra"):
        folder = directory / name
        if rank() == 0:
            evil = {"optimizer_state_dict": Evil(directory / "ran"), "module": Evil(directory / "ran")}
            victims = list(folder.glob(f"*{name}.pt"))
            if name == "extra":  # one that the manifest does not list, which comes first by its name
                torch.save(evil, folder / "aa_zero_pp_rank_0_mp_rank_00_optim_states.pt")
            else:
                torch.save(evil, victims[0])
                checkpoints.seal(folder, checkpoints.read_manifest(folder).facts)
        torch.distributed.barrier()
        try:
            _, client_state = engine.load_checkpoint(str(directory), name)
            found[name] = f"loaded {client_state['numpy'].tolist()} {client_state['best']}"
        except CheckpointError as error:
            found[name] = str(error)
            assert_identical(before, state(engine))
    assert not (directory / "ran").exists()
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_tampered_shard_runs_nothing_and_nothing_is_loaded(workers, tmp_path, stage):
    for found in workers(2).run(load_evil, stage, tmp_path):
        for name in ("optim_states", "model_states"):
            assert f"{name}.pt holds test_checkpoint_ranks.run, which is not a class" in found[name]
            assert "DS_AGSEL_TRUST_CHECKPOINTS=1, which runs whatever code" in found[name]
        assert found["extra"] == "loaded [0, 1, 2] 0.5"


def test_who_trusts_a_file_says_so(tmp_path, monkeypatch):
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "file.pt")
    files = tag_files.TagFiles(tmp_path)
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: its order changes as it grows and shrinks
    with pytest.raises(CheckpointError, match="not a class that checkpoints may hold"):
        files.load("file.pt")
    with pytest.raises(Exception, match=r"weights_only|WeightsUnpickler"), tag_files.restricted_unpickling():
        torch.load(tmp_path / "file.pt", weights_only=False)  # as DeepSpeed's own functions do
    assert not (tmp_path / "ran").exists() and set(torch.serialization.get_safe_globals()) == before
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"garbage\.pt is not a file that torch\.save wrote"):
        files.load("garbage.pt")
    monkeypatch.setenv(tag_files.TRUST_VARIABLE, "yes")
    with pytest.raises(CheckpointError, match="allowed are 0, and 1"):
        files.load("file.pt")
    monkeypatch.setenv(tag_files.TRUST_VARIABLE, "1")
    files.load("file.pt")
    assert (tmp_path / "ran").exists()


# -------------------------------------------------------------- switched off again


def load_without_selection(stage: int, directory: Path) -> dict[str, Any]:
    case = CASE.but(stage=stage)
    engine = build(case)
    run_steps(engine, case, 0, 1)
    engine.save_checkpoint(str(directory))
    saved = weights(engine)
    engine.destroy()
    found = {}
    for name, section in (("off", {**SELECT, "enabled": False}), ("all", {"policy": "all"})):
        engine = build(case.but(section=section, seed=99))
        try:
            engine.load_checkpoint(str(directory))
            found[name] = type(engine).__name__
        except CheckpointError as error:
            found[name] = str(error)
        if name == "off":  # DeepSpeed 0.19.8 loads nothing into ZeRO-3 without the second
            engine.load_checkpoint(str(directory), load_module_only=True, load_optimizer_states=False)
        assert_identical(saved, weights(engine))
        engine.destroy()
    with pytest.raises(AssertionError) as missing:  # DeepSpeed's own, without text
        engine = build(case.but(section={**SELECT, "enabled": False}))
        engine.load_checkpoint(str(directory), "nothing_there")
    found["missing"] = type(missing.value).__name__
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_with_the_section_switched_off_a_load_names_the_remedy(workers, tmp_path, stage):
    for found in workers(2).run(load_without_selection, stage, tmp_path):
        assert 'adagrad_select.enabled=true and adagrad_select.policy="all"' in found["off"]
        assert found["all"] == "SelectiveEngine" and found["missing"] != "CheckpointError"


def load_weights_alone(stage: int, directory: Path) -> None:
    """Of a tag that ``latest`` does not name."""
    case, saved = CASE.but(stage=stage), []
    engine = build(case)
    for step in (0, 1):
        run_steps(engine, case, step, step + 1)
        engine.save_checkpoint(str(directory), f"tag{step}")
        saved.append(weights(engine))
    engine.destroy()
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        engine = build(case.but(seed=99))
        engine.load_checkpoint(str(directory), "tag0", **options)
        assert_identical(saved[0], weights(engine))
        assert engine.selection.num_steps == 0
        engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_alone_are_those_of_the_tag(workers, tmp_path, stage):
    """DeepSpeed 0.19.8 loads nothing into ZeRO-3 with the first option, and another tag's with the second."""
    workers(2).run(load_weights_alone, stage, tmp_path)


# ---------------------------------------------------------------- another dtype


def save_and_load_as(stage: int, offload: str, directory: Path) -> dict[str, Any]:
    """By (saved, loaded) dtype: masters, moments and steps before and after, and the weights after."""
    found = {}
    for saved, loaded in (("fp32", "bf16"), ("bf16", "fp32")):
        case = CASE.but(stage=stage, offload=offload, dtype=saved)
        engine = build(case)
        run_steps(engine, case, 0, 2)
        engine.save_checkpoint(str(directory / saved))
        before = partitions(engine)
        engine.destroy()
        other = case.but(dtype=loaded, seed=99)
        engine = build(other)
        engine.load_checkpoint(str(directory / saved))
        after = {"partitions": partitions(engine), "weights": weights(engine)}
        run_steps(engine, other, 2, 3)
        found[saved, loaded] = (before, after, engine.selection.num_steps)
        engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_a_checkpoint_loads_into_another_dtype(workers, tmp_path, stage, offload):
    for found in workers(2).run(save_and_load_as, stage, offload, tmp_path):
        for before, after, steps in found.values():
            kept = ("shapes", "masters", "exp_avg", "exp_avg_sq", "step")
            for old, new in zip(before, after["partitions"], strict=True):
                assert_identical({key: old[key] for key in kept}, {key: new[key] for key in kept})
            assert steps == 3


# --------------------------------------------------- what the files hold of ours


class Stateful(policies.Policy):
    """Has a state that a resume needs."""

    def plan(self, step: int, update_counts: Any) -> tuple[int, ...]:
        return (step % self.context.num_blocks,)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [1, 2]}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def what_is_stored(directory: Path) -> dict[str, Any]:
    with mock.patch.dict(registry._POLICIES):
        policies.register("stateful", Stateful)
        case = CASE.but(stage=3, section={**SELECT, "policy": "stateful"})
        engine = build(case)
        run_steps(engine, case, 0, 3)
        engine.save_checkpoint(str(directory), "a")
        engine.load_checkpoint(str(directory), "a")
        seen = engine.selection.policy.seen
        engine.destroy()
    own = f"zero_pp_rank_{rank()}_mp_rank_00_model_states.pt"
    in_shard = tag_files.TagFiles(directory / "a").load(own).get(checkpointing.SELECTION_KEY)
    return {
        "in shard": in_shard,
        "seen": seen,
        "ours": json.loads((directory / "a" / checkpoints.STATE_FILE).read_text()),
    }


def test_the_history_is_stored_once_and_rank_0_alone_has_the_rest_twice(workers, tmp_path):
    first, second = workers(2).run(what_is_stored, tmp_path)
    assert second["in shard"] is None
    assert len(first["ours"]["history"]) == 3 and first["in shard"] == {**first["ours"], "history": []}
    assert first["seen"] == second["seen"] == [1, 2]


def test_a_run_gives_its_lock_back_when_its_engine_ends(workers, tmp_path):
    workers(1).run(order_of_a_save, tmp_path)
    heir = Run()
    heir.go_on_from(checkpoints.read_manifest(tmp_path / "global_step1").facts)
    assert heir.may_remove(tmp_path, checkpoints.read_manifest(tmp_path / "global_step1").facts["run"])


def with_frozen_layer(seed: int) -> Any:
    """An engine of a model whose first layer is frozen, and whose persistent parameters are few."""
    case = Case(stage=3, seed=seed, zero={"stage3_param_persistence_threshold": 0})
    model = tiny_model(case)
    model.model.layers[0].requires_grad_(False)
    return build(case, model)


def save_with_frozen(directory: Path) -> dict[str, torch.Tensor]:
    engine = with_frozen_layer(0)
    engine.save_checkpoint(str(directory))
    return weights(engine)


def load_with_frozen(directory: Path) -> dict[str, torch.Tensor]:
    engine = with_frozen_layer(99)
    engine.load_checkpoint(str(directory))
    return weights(engine)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_frozen_parameters_of_zero_3_load_on_another_rank_count(workers, tmp_path, before, after):
    saved = workers(before).run(save_with_frozen, tmp_path)[0]
    for loaded in workers(after).run(load_with_frozen, tmp_path):
        assert_identical(saved, loaded)
