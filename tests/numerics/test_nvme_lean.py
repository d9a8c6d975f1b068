"""Lean states and `on_reentry` on NVMe: bits of the same on the host, bytes of the file, accessors, checkpoints.

Needs DeepSpeed's asynchronous I/O op (libaio) and a folder on a disk that does direct I/O; skipped with the reason.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import test_packed
import test_split
import torch
from support import STATES, Case, assert_identical, build, case_id, finish, needs_nvme, run_steps, train
from test_estimator import described
from test_nvme import NVME, SELECTED, SLOW, kept, on_host, resume_all, save_all, weights_on_nvme
from test_overflow import check_a_bad_step
from test_travel import full_state, load, save

from ds_agsel.estimate.memory import selective_memory
from ds_agsel.estimate.steps import exact_step
from ds_agsel.estimate.traffic import selective_traffic
from ds_agsel.zero import compat
from ds_agsel.zero.states.halves import rounded
from ds_agsel.zero.storage import storage_bytes

pytestmark = needs_nvme()
NEEDS_LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (ds-agsel[lowbit])"
)


def but(case: Case, **section: Any) -> Case:
    return case.but(section={**(case.section or {}), **section})


def narrow(pages: int) -> dict[str, int]:
    """Room for the largest group and no other."""
    return {"state_budget_bytes": pages * 4096}


SPLIT = but(NVME, master_weights="split").but(dtype="bf16", clip=0.3)
BF16 = but(SPLIT, state_dtype="bf16", **narrow(4))
INT8 = but(NVME, state_dtype="int8", on_reentry="decay").but(decay_groups=True, zero={"sub_group_size": 300})
LEANEST = but(SPLIT, state_dtype="int8", on_reentry="reset", **narrow(3)).but(
    accumulation=2, zero={"sub_group_size": 300}
)
RESET = but(NVME, on_reentry="reset")
NO_LIBRARY = [
    BF16,
    RESET,
    but(SPLIT, on_reentry="decay"),
    but(NVME, on_reentry="decay", state_dtype="bf16").but(zero={"offload_param": {"device": "cpu"}}, model="net"),
]
CASES = [*NO_LIBRARY, *(pytest.param(case, marks=NEEDS_LIBRARY) for case in (INT8, LEANEST))]
MORE = [pytest.param(INT8, marks=[NEEDS_LIBRARY, SLOW]), pytest.param(LEANEST, marks=NEEDS_LIBRARY)]
MOSTLY_TWO = [pytest.param(1, marks=SLOW), 2]


def train_both(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(case), train(on_host(case))


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_bits_are_those_of_the_same_states_on_the_host(workers, case, ranks):
    for swapped, held in workers(ranks).run(train_both, case):
        assert_identical(kept(held, *SELECTED), kept(swapped, *SELECTED))


@SLOW
def test_model_weights_on_nvme_too(workers, tmp_path):
    case = but(weights_on_nvme(740), state_dtype="bf16")
    (swapped,) = workers(1).run(train, case)
    (held,) = workers(1).run(train, on_host(case).but(zero={}))
    assert_identical(kept(held, *SELECTED), kept(swapped, *SELECTED))
    saved = workers(1).run(save, case.but(steps=5), tmp_path)
    (loaded,) = workers(1).run(load, case.but(steps=5), tmp_path)
    assert_identical(full_state(saved), full_state([loaded["loaded"]]))


def watch_bytes(case: Case) -> dict[str, Any]:
    """After each step: what the file has of each group, what moved, and what DeepSpeed's places for states hold."""

    def observe(event: str, engine: Any, step: int) -> Any:
        if event != "step":
            return None
        home = engine.optimizer.home
        states = engine.optimizer.optimizer.state
        shown = [*compat.masters(engine.optimizer), *(s[key] for s in states.values() for key in STATES[1:])]
        groups = range(len(home.swapped.rooms))
        moved = engine.selection.traffic[-1]
        rests = [list(home.swapped.layout.sizes[group].values()) for group in groups]
        return {
            "with moments": [home.swapped.has_moments(group) for group in groups],
            "rests": rests,
            "padding": [home.swapped.layout.size(group) - sum(rests[group]) for group in groups],
            "block of group": home.block_of_group,
            "plan": engine.selection.plan.blocks,
            "moved": (moved.nvme_read_bytes, moved.nvme_written_bytes),
            "file": home.swapped.file_bytes(),
            "ring": home.swapped.ring_bytes(),
            "said": engine.optimizer.state_bytes(),
            "shown": storage_bytes(shown),
            "scratch": [getattr(home, name, int)() for name in ("scratch_bytes", "master_scratch_bytes")],
        }

    return train(case, observe)


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", [pytest.param(but(SPLIT, state_dtype="bf16"), marks=SLOW), RESET, *MORE], ids=case_id)
def test_the_file_the_ring_and_each_transfer_take_the_resting_bytes(workers, case, ranks):
    """To the byte what is estimated, and the padding of direct I/O: two stretches of a group, each less than a page."""
    model, setup = described(case, ranks)
    every = range(len(model.blocks))
    for rank, run in enumerate(workers(ranks).run(watch_bytes, case)):
        updated: set[int] = set()
        stayed: set[int] = set()  # with moments, when the step begins
        for (_, phase, blocks), seen in zip(run["history"], run["observed"], strict=True):
            updated |= set(blocks)
            step = exact_step(phase, len(every), blocks, every, updated, resident=stayed)
            memory = selective_memory(model, setup, "host", step, rank)
            traffic = selective_traffic(model, setup, "host", step, rank)
            of_group = list(zip(seen["block of group"], seen["rests"], seen["padding"], strict=True))
            rests = sum(masters + sum(moments) * (b in updated) for b, (masters, *moments), _ in of_group)
            assert memory.nvme.total == rests
            room = sum(padding for *_, padding in of_group)
            assert rests <= seen["file"] <= rests + room + 16 * 4096  # and the file system's own
            written = sum(sum(sizes) + padding for block, sizes, padding in of_group if block in blocks)
            assert seen["moved"][1] == written
            assert traffic.nvme_write == sum(sum(sizes) for block, sizes, _ in of_group if block in blocks)
            if case.section.get("on_reentry") == "reset":
                assert 0 <= seen["moved"][0] - traffic.nvme_read < 2 * 4096 * len(of_group)
                next_blocks = set(every) if seen["plan"] is None else set(seen["plan"])
                stayed = set(blocks) & next_blocks
                assert [*seen["with moments"]] == [block in stayed for block, *_ in of_group]
            else:
                assert [*seen["with moments"]] == [block in updated for block, *_ in of_group]
            assert seen["said"] == sum(
                sum(moments) for has, (_, *moments) in zip(seen["with moments"], seen["rests"], strict=True) if has
            )
            assert seen["shown"] <= 4 * len(of_group)  # zeros without storage
            budget = case.section.get("state_budget_bytes")
            assert seen["ring"] == (budget or largest_of(seen, step.bound.num_blocks))
            assert sum(seen["scratch"]) == scratch_of(case, seen)


def largest_of(seen: dict[str, Any], num_blocks: int) -> int:
    """The bytes of as many of the largest blocks, at most 4, with their padding."""
    of_block: dict[int, int] = {}
    for block, sizes, padding in zip(seen["block of group"], seen["rests"], seen["padding"], strict=True):
        of_block[block] = of_block.get(block, 0) + sum(sizes) + padding
    return sum(sorted(of_block.values())[-min(num_blocks, 4) :])


def scratch_of(case: Case, seen: dict[str, Any]) -> int:
    splits, packs = case.section.get("master_weights") == "split", "state_dtype" in case.section
    numel = max(masters for masters, *_ in seen["rests"]) // (2 if splits else 4)
    return (splits * 4 + (splits or packs) * 8) * numel


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", [BF16, *MORE, *(pytest.param(case, marks=SLOW) for case in NO_LIBRARY[1:])],
                         ids=case_id)  # fmt: skip
def test_resume_is_bit_identical_to_not_stopping_on_nvme_and_from_the_host(workers, tmp_path, case, ranks):
    """The checkpoint is the same as with offload to the host: each is loaded by the other too."""
    group, host = workers(ranks), on_host(case)
    whole = group.run(train, case)
    saving = group.run(save_all, [case], tmp_path / "nvme")
    group.run(save_all, [host], tmp_path / "host")
    group.stop()
    last = ("weights", "partitions", *SELECTED)
    for run, folder in ((case, "nvme"), (host, "nvme"), (case, "host")):
        resumed = group.run(resume_all, [run], tmp_path / folder)
        for expected, (saved,), (after,) in zip(whole, saving, resumed, strict=True):
            assert_identical({key: expected[key] for key in last}, {key: saved[key] for key in last})
            assert_identical({key: expected[key] for key in last}, {key: after[key] for key in last})


def test_another_rank_count_goes_on_from_the_same_bits(workers, tmp_path):
    saved = workers(2).run(save, BF16, tmp_path)
    (loaded,) = workers(1).run(load, BF16, tmp_path)
    assert_identical(full_state(saved), full_state([loaded["loaded"]]))


def move_between_forms(lean: Case, directory: Path) -> list[tuple[Any, Any, int]]:
    """Save a run with fp32 states and load it with lean ones, and the other way round: states, files that were made."""
    found = []
    whole = but(lean, state_dtype="fp32", master_weights="fp32", state_budget_bytes=None)
    for name, first, second in (("to lean", whole, lean), ("to fp32", lean, whole)):
        engine = build(first)
        run_steps(engine, first, 0, 2)
        engine.save_checkpoint(str(directory / name))
        before = test_split.partitions(engine)
        engine.destroy()
        engine = build(second.but(seed=99))
        swapped = engine.optimizer.home.swapped
        rooms: list[int] = []
        new_room = swapped.room
        swapped.room = lambda numel, rooms=rooms, new=new_room: rooms.append(numel) or new(numel)
        engine.load_checkpoint(str(directory / name))
        swapped.room = new_room
        found.append((before, test_split.partitions(engine), sum(rooms)))
        finish(engine, run_steps(engine, second, 2, 4))
    return found


@pytest.mark.parametrize("case", [BF16, pytest.param(INT8, marks=NEEDS_LIBRARY)], ids=case_id)
def test_a_checkpoint_loads_into_the_other_form(workers, tmp_path, case):
    """What is fp32 on the way, the master weights of split ones or the moments, is made in a file."""
    for to_lean, to_fp32 in workers(2).run(move_between_forms, case, tmp_path):
        before, after, room = to_lean
        numel = sum(each["masters"].numel() for each in before)
        assert (room >= numel) == ("master_weights" in case.section)
        for old, new in zip(before, after, strict=True):
            assert_identical(old["masters"], new["masters"])
            assert old["step"] == new["step"]
            for kind in STATES[1:]:
                assert (new[kind] - old[kind]).norm() <= 0.03 * old[kind].norm()
        before, after, room = to_fp32
        assert_identical(before, after)
        assert room >= 2 * sum(each["masters"].numel() for each in before if each["step"])


@pytest.mark.parametrize("case", [BF16, pytest.param(INT8, marks=NEEDS_LIBRARY)], ids=case_id)
def test_accessors_answer_in_fp32_and_what_is_set_rests_in_the_form(workers, case):
    for rank in workers(2).run(test_packed.read_and_set, case):
        for kind, (before, after, value) in rank["found"].items():
            assert all(tensor.dtype == torch.float32 for tensor in (*before.values(), *after.values()))
            assert bool(before["exp_avg"].any()) == (kind == "updated")
            assert torch.allclose(after["exp_avg"], value, rtol=0.02)
            assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"])
    if "master_weights" in case.section:
        for rank in workers(2).run(test_split.read_and_set, case):
            for value, master, weight, moment in rank:
                assert torch.equal(master, value) and torch.equal(weight.float(), rounded(value))
                assert torch.equal(moment, value.to(torch.bfloat16).float())


def test_a_skipped_step_changes_nothing(workers, trained):
    check_a_bad_step(workers, trained, but(BF16, on_reentry="reset"))


def replace_a_master(case: Case) -> list[bool]:
    """Whether a new tensor that a writer puts in a master weight's place, and what it writes to a moment, are kept."""
    engine = build(case)
    run_steps(engine, case, 0, 1)
    home = engine.optimizer.home
    group = home.groups_of(engine.selection.history[0].blocks)[0]
    master = compat.masters(engine.optimizer)[group]
    state = engine.optimizer.optimizer.state[master]
    with home.writable((group,)):
        master.data = torch.full((master.numel(),), 0.25)
        state[STATES[1]] = torch.full((master.numel(),), 0.5)
    with home.readable((group,)):
        found = [bool((master == 0.25).all()), bool((state[STATES[1]] == 0.5).all())]
    engine.destroy()
    return found


def test_new_tensors_in_the_place_of_states_are_kept(workers):
    assert workers(1).run(replace_a_master, but(NVME, state_dtype="bf16")) == [[True, True]]
