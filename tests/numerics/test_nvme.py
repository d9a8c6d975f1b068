"""ZeRO-3 with states on NVMe: the promises, the bytes that are read and written, and checkpoints.

Needs DeepSpeed's asynchronous I/O op (libaio) and a folder on a disk that does direct I/O; skipped with the reason.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_engines import UNPINNED, swaps_page_locked_memory_alone
from reference_runs import assert_follows_reference
from support import (
    ALL,
    SELECT,
    TOPK,
    Case,
    assert_identical,
    needs_nvme,
    train,
    train_all,
)
from test_estimator import described
from test_reference import FP32
from test_resume import KINDS, resume, save_and_go_on

from ds_agsel.estimate.steps import exact_step
from ds_agsel.estimate.traffic import selective_traffic

pytestmark = needs_nvme()
SLOW = pytest.mark.slow

NVME = Case(stage=3, offload="nvme")
# Room for the largest block and no other.
NARROW = {"state_budget_bytes": 7 * 4096}
CASES = [
    NVME.but(clip=0.3, decay_groups=True, section={**SELECT, **NARROW}),
    NVME.but(dtype="bf16", accumulation=2, section={**TOPK, "select_percent": 60, **NARROW}),
    NVME.but(zero={"sub_group_size": 300}, section={**SELECT, "select_percent": 60, **NARROW}),
    NVME.but(zero={"offload_param": {"device": "cpu"}}, optimizer="Adam", model="net"),
]
# With buffers in memory for little more than one step's units of the smaller kind.
MODULES = NVME.but(dtype="bf16", clip=0.3, section={**SELECT, "granularity": "module", "select_percent": 20, **NARROW})
KEPT = ("losses", "norms", "lrs", "weights", "partitions", "skipped")
SELECTED = ("history", "counts", "plan")


def on_host(case: Case) -> Case:
    section = {key: value for key, value in case.section.items() if key != "state_budget_bytes"}
    return case.but(offload="cpu", section=section)


def kept(run: dict[str, Any], *more: str) -> dict[str, Any]:
    return {key: run[key] for key in (*KEPT, *more)}


@pytest.mark.parametrize(
    ("ranks", "cases"), [pytest.param(1, [*CASES, MODULES], marks=SLOW), (2, [*CASES[1::2], MODULES])]
)
def test_states_on_nvme_give_the_bits_of_states_on_the_host(workers, ranks, cases):
    for runs in workers(ranks).run(train_all, [variant for case in cases for variant in (case, on_host(case))]):
        for swapped, held in zip(runs[::2], runs[1::2], strict=True):
            assert_identical(kept(held, *SELECTED), kept(swapped, *SELECTED))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), 2])
def test_follows_the_reference_and_leaves_the_unselected_as_they_are(trained, ranks):
    runs = trained(CASES[2], ranks)
    assert_follows_reference(CASES[2], runs, FP32)
    for run in runs:
        blocks = list(run["blocks"].values())
        for (_, _, selected), before, after in zip(run["history"], run["observed"], run["observed"][1:], strict=False):
            idle = {name for index, names in enumerate(blocks) if index not in selected for name in names}
            for old, new in zip(before["partitions"], after["partitions"], strict=True):
                if old["shapes"].keys() <= idle:
                    assert_identical(old, new)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), 2])
def test_policy_all_is_plain_deepspeed_on_nvme(workers, ranks):
    """Layers of 2 MiB, which DeepSpeed swaps out on two ranks too, from 1 MiB on; and small ones, which it keeps.

    The gains are in groups of their own. With one before a layer's weight, that weight's gradient is at no multiple of
    512 bytes in its sub-group, where direct I/O reads nothing, and plain DeepSpeed 0.19.8 trains on what is in memory.
    """
    if swaps_page_locked_memory_alone():
        pytest.skip(UNPINNED)
    case = NVME.but(model="net740", steps=3, section=ALL, clip=0.3, decay_groups=True)
    for selective, plain in workers(ranks).run(train_all, [case, case.but(section=None)]):
        assert_identical(kept(plain), kept(selective))


class Recorder:
    """A handle of the I/O op that notes what it is asked for, and hands it on."""

    def __init__(self, handle: Any, log: list[tuple[str, int, int]]) -> None:
        self._handle, self._log = handle, log

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        self._log.append(("read", offset, tensor.nbytes))
        return self._handle.async_pread(tensor, path, offset)

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        self._log.append(("written", offset, tensor.nbytes))
        return self._handle.async_pwrite(tensor, path, offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def watch_file(case: Case) -> dict[str, Any]:
    """A run of ``case`` with what its I/O handles were asked for, by (step, phase)."""
    log: list[tuple[str, int, int]] = []

    def observe(event: str, engine: Any, step: int) -> Any:
        swapped = engine.optimizer.home.swapped
        if (event, step) == ("start", 0):
            new_handle = swapped._new_handle
            swapped._new_handle = lambda: Recorder(new_handle(), log)
            swapped._idle[:] = [Recorder(handle, log) for handle in swapped._idle]
            swapped.forget()
        seen = {"event": event, "transfers": log.copy(), "file_bytes": swapped.file_bytes()}
        log.clear()
        if event == "step":
            plan = engine.selection.plan
            traffic = engine.selection.traffic[-1]
            seen |= {"plan": plan.blocks, "traffic": (traffic.nvme_read_bytes, traffic.nvme_written_bytes)}
            starts = {start: group for group, start in swapped.layout.starts().items()}
            layout = swapped.layout
            sizes = {group: (layout.master_size(group), layout.size(group)) for group in starts.values()}
            seen |= {"group_at": starts, "sizes": sizes, "block_of_group": engine.optimizer._block_of_group}
        return seen

    return train(case, observe)


@pytest.mark.parametrize(
    ("case", "ranks"),
    [(NVME, 1), (CASES[2], 2), pytest.param(NVME, 2, marks=SLOW), pytest.param(CASES[2], 1, marks=SLOW)],
    ids=["wide ring, 1 rank", "narrow ring, 2 ranks", "wide ring, 2 ranks", "narrow ring, 1 rank"],
)
def test_only_selected_states_are_read_and_written_and_reading_starts_with_the_draw(workers, case, ranks):
    model, setup = described(case, ranks)
    every = range(len(model.blocks))
    for rank, run in enumerate(workers(ranks).run(watch_file, case)):
        updated: set[int] = set()  # groups with moments
        ahead: list[tuple[str, int, int]] = []  # read when this step was planned
        seen = run["observed"]
        for (_, phase, blocks), start, backward, step in zip(
            run["history"], seen[::3], seen[1::3], seen[2::3], strict=True
        ):
            assert [part["event"] for part in (start, backward, step)] == ["start", "backward", "step"]
            assert start["transfers"] == [] or not updated  # the very first step has no step before it
            ahead += start["transfers"]
            transfers = step["transfers"]
            last = max(index for index, (kind, _, _) in enumerate(transfers) if kind == "written")
            during, next_ahead = ahead + backward["transfers"] + transfers[: last + 1], transfers[last + 1 :]
            groups = [group for group, block in enumerate(step["block_of_group"]) if block in blocks]
            sizes = step["sizes"]

            def moved(kind: str, parts: list[tuple[str, int, int]], step: dict[str, Any] = step) -> dict[int, int]:
                found = [(step["group_at"][at], size) for which, at, size in parts if which == kind]
                assert len(found) == len(dict(found))  # none twice
                return dict(found)

            read, written = moved("read", during), moved("written", during)
            assert written == {group: sizes[group][1] for group in groups}
            # A block that was never updated has no moments to read.
            assert read == {group: sizes[group][group in updated] for group in groups}
            assert step["traffic"] == (sum(read.values()), sum(written.values()))
            estimated = selective_traffic(
                model, setup, "host", exact_step(phase, len(every), blocks, every, every), rank
            )
            assert 0 <= sum(written.values()) - estimated.nvme_write < len(groups) * 3 * mmap.ALLOCATIONGRANULARITY
            if phase == "explore":
                assert ahead == [] and backward["transfers"] == []
            else:
                assert moved("read", ahead).keys() == set(groups) or case != NVME
                assert ahead
            updated |= set(groups)
            planned = step["plan"] or ()
            assert {step["block_of_group"][step["group_at"][at]] for _, at, _ in next_ahead} <= set(planned)
            assert bool(next_ahead) == (step["plan"] is not None)
            ahead = next_ahead
            held = sum(of_group[group in updated] for group, of_group in sizes.items())
            assert held <= step["file_bytes"] <= held + 16 * mmap.ALLOCATIONGRANULARITY  # and the file system's own


def resume_all(cases: list[Case], directory: Path) -> list[dict[str, Any]]:
    return [resume(case, directory / f"{index}") for index, case in enumerate(cases)]


def save_all(cases: list[Case], directory: Path) -> list[dict[str, Any]]:
    return [save_and_go_on(case, directory / f"{index}", KINDS[index % 2]) for index, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, CASES[:1]), *(pytest.param(ranks, CASES, marks=SLOW) for ranks in (1, 2))],
)
def test_resume_is_bit_identical_to_not_stopping_on_nvme_and_from_the_host(workers, tmp_path, ranks, cases):
    """The checkpoint is the same as with offload to the host: each is loaded by the other too."""
    group = workers(ranks)
    whole = group.run(train_all, cases)
    saving = group.run(save_all, cases, tmp_path / "nvme")
    group.run(save_all, [on_host(case) for case in cases], tmp_path / "host")
    group.stop()
    resumed = [
        group.run(resume_all, cases, tmp_path / "nvme"),
        group.run(resume_all, [on_host(case) for case in cases], tmp_path / "nvme"),
        group.run(resume_all, cases, tmp_path / "host"),
    ]
    last = ("weights", "partitions", *SELECTED)
    for rank in range(ranks):
        for index, run in enumerate(whole[rank]):
            expected = {key: run[key] for key in last}
            assert_identical(expected, {key: saving[rank][index][key] for key in last})
            for after in resumed:
                assert_identical(expected, {key: after[rank][index][key] for key in last})


def weights_on_nvme(width: int, **changes: Any) -> Case:
    """Layers whose weights take 1 MiB of a rank and more, which DeepSpeed then keeps on NVMe."""
    offload = {"device": "nvme", "max_in_cpu": 0, "buffer_size": 1_200_000, "buffer_count": 8}
    zero = {"offload_param": offload, "stage3_prefetch_bucket_size": 0}
    return NVME.but(model=f"net{width}", dtype="bf16", decay_groups=True, clip=0.3, steps=4, zero=zero).but(**changes)


def train_noting_written_weights(case: Case) -> dict[str, Any]:
    """A run of ``case``, with the names of the parameters that each step has written to NVMe."""
    written: list[str] = []

    def observe(event: str, engine: Any, step: int) -> Any:
        zero = engine.optimizer
        if (event, step) == ("start", 0):
            [swapper] = {param.nvme_swapper for params in zero.fp16_groups for param in params}
            swap_out = swapper.swap_out_partitioned_params

            def noting(dst_fp16_params: Any, src_fp32_params: Any) -> None:
                written.extend(zero.param_names[param] for param in dst_fp16_params)
                swap_out(dst_fp16_params, src_fp32_params)

            swapper.swap_out_partitioned_params = noting
        if event == "step":
            seen = tuple(written)
            written.clear()
            return seen
        return None

    return train(case, observe)


@pytest.mark.parametrize(("ranks", "width"), [(1, 740), pytest.param(2, 1080, marks=SLOW)])
def test_model_weights_on_nvme_too(workers, tmp_path, ranks, width):
    if swaps_page_locked_memory_alone():
        pytest.skip(UNPINNED)
    group = workers(ranks)
    case = weights_on_nvme(width)
    every = weights_on_nvme(width, section=ALL, steps=2)
    for selective, plain in group.run(train_all, [every, every.but(section=None)]):
        assert_identical(kept(plain), kept(selective))
    runs = group.run(train_noting_written_weights, case)
    for swapped, (held,) in zip(runs, group.run(train_all, [on_host(case).but(zero={})]), strict=True):
        assert_identical(kept(held, *SELECTED), kept(swapped, *SELECTED))
        names = list(swapped["blocks"].values())
        for (_, _, blocks), written in zip(swapped["history"], swapped["observed"], strict=True):
            layers = [name for block in blocks for name in names[block] if name.endswith("linear.weight")]
            assert list(written) == layers
    group.run(save_and_go_on, case.but(steps=5), tmp_path, KINDS[0])
    for whole, resumed in zip(
        group.run(train, case.but(steps=6)), group.run(resume, case.but(steps=6), tmp_path), strict=True
    ):
        assert_identical(whole["weights"], resumed["weights"])
        assert_identical(whole["partitions"], resumed["partitions"])
