"""States that visit a device whose copies are late: the waits of residency/transfer are enough, and each is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rehearsal import rehearse
from simulator import Hazard, simulated
from workers import Workers

WAITS = ("d2h for compute", "h2d for d2h", "compute for h2d", "host for d2h", "h2d for compute", "d2h for h2d")

CLOSE_GAPS = (5, 12, 17, 21, 33, 36, 38, 44)  # seeds with which tensors move in the arena


class _Forgetful:
    """A stream or event whose one kind of wait does nothing."""

    def __init__(self, real: Any, forgets: tuple[str, ...]) -> None:
        self.real, self._forgets = real, forgets

    def __getattr__(self, name: str) -> Any:
        if name in self._forgets:
            return lambda *args: None
        return lambda *args: getattr(self.real, name)(*(getattr(arg, "real", arg) for arg in args))


class ForgetfulDevice:
    """A device on which one kind of the waits of [Note: Waits] is left out."""

    def __init__(self, device: Any, wait: str) -> None:
        self._device, self._wait = device, wait
        self._streams_made = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def Stream(self) -> Any:  # the first is H2D, the second D2H
        self._streams_made += 1
        forgets = {
            "h2d for d2h": (1, "wait_event"), "h2d for compute": (1, "wait_stream"),
            "d2h for compute": (2, "wait_stream"), "d2h for h2d": (2, "wait_event"),
        }  # fmt: skip
        which, name = forgets.get(self._wait or "", (0, ""))
        return _Forgetful(self._device.Stream(), (name,) * (self._streams_made == which))

    def Event(self) -> Any:
        return _Forgetful(self._device.Event(), ("synchronize",) if self._wait == "host for d2h" else ())

    def stream(self, stream: Any) -> Any:
        return self._device.stream(stream.real)

    def current_stream(self) -> Any:
        forgets = ("wait_event",) if self._wait == "compute for h2d" else ()
        return _Forgetful(self._device.current_stream(), forgets)


def rehearse_on_device(seeds: Sequence[int], wait: str | None) -> dict[str, int]:
    """How many of ``seeds`` went right, gave wrong numbers, met a hazard, or closed gaps, with ``wait`` left out."""
    outcomes = {"right": 0, "wrong": 0, "hazard": 0, "gaps closed": 0}
    for seed in seeds:
        device = simulated(seed=seed, strict=True)
        try:
            twin = rehearse(device if wait is None else ForgetfulDevice(device, wait), seed)
            outcomes["gaps closed"] += twin.transfer.arena_moved_bytes > 0
            outcomes["right"] += 1
        except Hazard:
            outcomes["hazard"] += 1
        except AssertionError:
            outcomes["wrong"] += 1
        finally:
            simulated(seed=seed, strict=False).synchronize()
    return outcomes


def test_visiting_states_are_right_in_every_order(simulated_workers: Callable[[int], Workers]) -> None:
    [outcomes] = simulated_workers(1).run(rehearse_on_device, range(24), None)
    assert outcomes.pop("gaps closed") > 2
    assert outcomes == {"right": 24, "wrong": 0, "hazard": 0}


@pytest.mark.parametrize("wait", WAITS)
def test_each_wait_is_needed(simulated_workers: Callable[[int], Workers], wait: str) -> None:
    seeds = CLOSE_GAPS if wait in ("h2d for compute", "d2h for h2d") else range(10)
    [outcomes] = simulated_workers(1).run(rehearse_on_device, seeds, wait)
    assert outcomes["wrong"] + outcomes["hazard"] > 0
