"""What a step asks of the device, counted on the simulated accelerator: host waits and operations, against plain's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any
from unittest import mock

import pytest
import torch
from simulator import Counts, simulated
from simulator.counters import table
from support import BETAS, EPS, GRASS, LEARNING_RATE, MISA, MODULE, WEIGHT_DECAY, Case, case_id, train
from workers import Workers

UNTIMED = {"timers": {"throughput": {"enabled": False}}}  # the timer synchronizes the device at every step
PARAMS = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
ADAM = {"optimizer": {"type": "AdamW", "params": {**PARAMS, "torch_adam": True}}}
PINNED = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
CASES = [
    Case(
        stage=stage, offload=offload, dtype="bf16", clip=0.5, steps=6,
        config=UNTIMED if offload == "cpu" else {**UNTIMED, **ADAM},
        zero=PINNED if offload == "cpu" else {},
    )
    for stage, offload in product((1, 2, 3), ("none", "cpu"))
]  # fmt: skip
# Modules, whose groups are many more than blocks, and policies that observe what is updated.
OF_UNITS = [
    pytest.param(case.but(section=section), marks=() if place % 3 == number else pytest.mark.slow)
    for number, section in enumerate((MODULE, MISA, GRASS)) for place, case in enumerate(CASES)
]  # fmt: skip


def count(case: Case) -> list[tuple[str, Counts, Counts]]:
    """Of each step: phase, what forward and backward asked of the device, and what ``step`` did.

    Copies whose event the host asks for are there: the device keeps up with the host, and nothing throttles it.
    """
    accelerator = simulated(seed=1)
    queue = accelerator.queue
    seen: list[Counts] = []

    def observe(event: str, engine: Any, step: int) -> None:
        if event == "start":
            queue.finish()
        seen.append(accelerator.counts())

    def keeps_up(event: Any) -> bool:
        queue._finish(event)
        return True

    with mock.patch.object(queue, "query_event", keeps_up):
        run = train(case, observe)
    queue.finish()
    spans = [later.since(earlier) for earlier, later in pairwise(seen)]
    phases = [phase for _, phase, _ in run["history"]] if "history" in run else ["plain"] * case.steps
    return [(phase, spans[3 * step], spans[3 * step + 1]) for step, phase in enumerate(phases)]


@pytest.fixture(scope="module")
def counted(simulated_workers: Callable[[int], Workers]) -> Callable[[Case], list[Any]]:
    """``counted(case)``: `count` on one rank; made once."""
    runs: dict[str, list[Any]] = {}

    def run(case: Case) -> list[Any]:
        key = repr(case)
        if key not in runs:
            [runs[key]] = simulated_workers(1).run(count, case)
        return runs[key]

    return run


@pytest.mark.parametrize("case", [*CASES, *OF_UNITS], ids=case_id)
def test_the_host_waits_once_in_a_step_whatever_it_updates(counted, case):
    """For the norm, which DeepSpeed's overflow check needs; of an explore step for its scores, which have it.

    GRASS's probing steps update nothing: with stage 3 they wait for the reduction of the gradients that they drop.
    """
    drops = case.stage == 3 and case.section.get("policy") == "grass"
    for phase, backward, step in counted(case)[1:]:
        ours = backward.waits_at("ds_agsel/zero").total()
        assert ours <= (phase == "explore" and case.stage > 1), table(backward.waits)
        norm = 0 if phase == "explore" and case.stage > 1 and not drops else 1
        mine = step.waits_at("ds_agsel/zero") + step.waits_at("deepspeed/runtime/utils.py")
        assert mine.total() <= norm, table(step.waits)


@pytest.mark.parametrize("case", [*CASES, *OF_UNITS], ids=case_id)
def test_no_step_waits_much_more_than_a_plain_one(counted, case):
    """A plain one with as many param groups; its explore steps may wait twice more."""
    of_plain = min(step.num_waits for _, _, step in counted(case.but(section=None)))
    for phase, backward, step in counted(case)[1:]:
        waits = step.num_waits + backward.waits_at("ds_agsel/zero").total()
        assert waits <= of_plain + (2 if phase == "explore" else 0), table(step.waits)


@pytest.mark.parametrize("case", [*CASES, *OF_UNITS], ids=case_id)
def test_a_steps_operations_follow_its_share(counted, case):
    """Two blocks of six are updated: a third of the groups."""
    of_plain = max(step.num_operations for _, _, step in counted(case.but(section=None)))
    for _, _, step in counted(case)[1:]:
        assert step.num_operations <= 0.4 * of_plain, table(step.operations)


def test_nothing_synchronizes_the_device_after_backward(counted):
    """`overlap_comm` of plain DeepSpeed does, at every backward."""
    case = CASES[2].but(zero={"overlap_comm": True}, steps=3)
    assert case.stage == 2
    for _, backward, step in counted(case):
        assert not (backward.waits_by_name() + step.waits_by_name())["synchronize"]
    assert counted(case.but(section=None))[1][1].waits_by_name()["synchronize"]


class TimedEvent:
    """An event whose time is its place among all events that the device has passed, in milliseconds."""

    passed = made = waits = 0

    def __init__(self, queue: Any, event: Any) -> None:
        self._queue, self._event = queue, event
        self._at: int | None = None
        TimedEvent.made += 1

    def record(self) -> None:
        self._queue.submit("clock", self._pass, ())
        self._event.record()

    def _pass(self) -> None:
        TimedEvent.passed += 1
        self._at = TimedEvent.passed

    def query(self) -> bool:
        return self._at is not None

    def synchronize(self) -> None:
        TimedEvent.waits += 1
        self._event.synchronize()

    def elapsed_time(self, end: TimedEvent) -> float:
        if self._at is None or end._at is None:
            raise RuntimeError("not ready")
        return end._at - self._at


def time_blocks(case: Case) -> tuple[list[dict[str, Any]], int]:
    """After each step the policy's state and the number of timed events so far; how often the host waited for one."""
    accelerator = simulated(seed=1)
    seen: list[dict[str, Any]] = []

    def event(enable_timing: bool = False) -> Any:
        made = torch.Event(device=accelerator.device())
        return TimedEvent(accelerator.queue, made) if enable_timing else made

    def observe(event: str, engine: Any, step: int) -> None:
        if event == "step":
            seen.append({**engine.selection.state_dict()["policy"], "events": TimedEvent.made})

    with mock.patch.object(type(accelerator), "Event", property(lambda self: event)):
        train(case, observe)
    accelerator.queue.finish()
    return seen, TimedEvent.waits


@pytest.mark.parametrize("stage", [2, 3])
def test_the_times_of_blocks_come_from_events_for_which_nothing_waits(simulated_workers, stage):
    """`cost_aware` measures two probing steps. Backward comes to the embedding last, the head's gain first."""
    section = {"policy": "cost_aware", "select_percent": 34, "score": "norm", "probe_steps": 2, "select_every": 2}
    case = CASES[0].but(stage=stage, section=section, steps=4)
    [(seen, waits)] = simulated_workers(1).run(time_blocks, case)
    times = seen[1]["arrivals"]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert all(float(1000 * time).is_integer() for time in times), "by the clock"
    assert waits == 0
    assert seen[0]["events"] < seen[1]["events"] == seen[-1]["events"]


def test_offload_on_one_rank_copies_gradients_beside_backward(simulated_workers):
    case = CASES[3].but(zero={**PINNED, "overlap_comm": True}, steps=3)
    assert case.offload == "cpu"
    streams = simulated_workers(1).run(streams_of_copies, case)[0]
    assert len(streams) == 1 and 0 not in streams


def streams_of_copies(case: Case) -> set[int]:
    """The streams on which copies to the host of gradients, not scores, were queued in backward."""
    accelerator = simulated(seed=1)
    streams: set[int] = set()
    original = accelerator.queue.submit
    in_backward = False

    def submit(name: str, run: Any, accesses: Any, stream: int | None = None) -> None:
        if in_backward and name == "copy D2H" and any(access.last - access.first > 200 for access in accesses):
            streams.add(accelerator.queue.current() if stream is None else stream)
        original(name, run, accesses, stream)

    def observe(event: str, engine: Any, step: int) -> None:
        nonlocal in_backward
        in_backward = event == "start"

    with mock.patch.object(accelerator.queue, "submit", submit):
        train(case, observe)
    accelerator.queue.finish()
    return streams
