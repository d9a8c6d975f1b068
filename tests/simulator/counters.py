"""Counts what a real accelerator would have to do or wait for: kernels and copies, host waits, allocations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from simulator.hazards import Site


class Cause(NamedTuple):
    """What was done, and the innermost line outside torch and the simulator that asked for it."""

    name: str
    site: Site


@dataclass
class Counts:
    """What one process has asked of the accelerator since `Counts` was made, or in a span of `counting`.

    Attributes:
        operations: what was queued: kernels ("aten.mul.out"), copies ("copy H2D", "copy D2H", "copy D2D"), collectives.
        waits: where the host stood still: "synchronize" (the device), "synchronize stream", "synchronize event", copies
            that are not asynchronous ("copy H2D", "copy D2H"), and operators whose result the host gets, or whose
            result's size depends on data ("aten._local_scalar_dense.default" is `Tensor.item`).
        device_allocations: of device memory, whatever a caching allocator makes of them.
        pinned_allocations: of page-locked memory that torch's caching host allocator would ask of the driver.
    """

    operations: Counter[Cause] = field(default_factory=Counter)
    waits: Counter[Cause] = field(default_factory=Counter)
    device_allocations: int = 0
    pinned_allocations: int = 0

    @property
    def num_operations(self) -> int:
        return self.operations.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def waits_by_name(self) -> Counter[str]:
        return by_name(self.waits)

    def operations_by_name(self) -> Counter[str]:
        return by_name(self.operations)

    def waits_at(self, part_of_path: str) -> Counter[Cause]:
        """Those host waits whose line is in a file of that path: "ds_agsel" for ours, "deepspeed" for theirs."""
        return Counter({cause: count for cause, count in self.waits.items() if part_of_path in cause.site.file})

    def since(self, earlier: Counts) -> Counts:
        return Counts(
            self.operations - earlier.operations,
            self.waits - earlier.waits,
            self.device_allocations - earlier.device_allocations,
            self.pinned_allocations - earlier.pinned_allocations,
        )

    def copy(self) -> Counts:
        return Counts(self.operations.copy(), self.waits.copy(), self.device_allocations, self.pinned_allocations)


def by_name(causes: Counter[Cause]) -> Counter[str]:
    names: Counter[str] = Counter()
    for cause, count in causes.items():
        names[cause.name] += count
    return names


def table(causes: Counter[Cause], most: int = 20) -> str:
    """The most frequent of ``causes``, a line each, for a failing test's message."""
    lines: Iterable[tuple[Cause, int]] = causes.most_common(most)
    return "\n".join(f"{count:6d} {cause.name} at {cause.site}" for cause, count in lines)
