"""The places of states in a file on NVMe and in its buffers: pure, by group and elements, without tensors.

[Note: Ring] The groups of a step pass through one stretch of buffers, used as a ring in the order of their update: a
group is read to where the oldest ones lay, as soon as those have been written back. Only the
ring's size limits how far reading runs ahead of the update; it must hold the largest group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MOST_BLOCKS = 4  # in host memory at once: one is written back, one is updated, two are read ahead
TENSORS = 3  # of a group: master weights, exp_avg, exp_avg_sq, in this order


@dataclass(frozen=True)
class FileLayout:
    """Where each group's tensors lie in a rank's file, in elements.

    Attributes:
        numels: of each group's partition.
        alignment: elements that places and sizes are multiples of, as direct I/O requires.
    """

    numels: Mapping[int, int]
    alignment: int

    def padded(self, group: int) -> int:
        """Return the elements that one tensor of ``group`` takes, padding included."""
        return -(-self.numels[group] // self.alignment) * self.alignment

    def size(self, group: int) -> int:
        """Return the elements that ``group`` takes in the file and in the ring."""
        return TENSORS * self.padded(group)

    def starts(self) -> dict[int, int]:
        """Return where each group begins in the file."""
        found, end = {}, 0
        for group in self.numels:
            found[group] = end
            end += self.size(group)
        return found

    def total(self) -> int:
        """Return the elements that all groups take in the file, once each has been updated."""
        return sum(map(self.size, self.numels))


def default_ring(block_sizes: Iterable[int], max_selected: int) -> int:
    """Return the summed size of the largest blocks that a step can have, at most `MOST_BLOCKS` of them."""
    return sum(sorted(block_sizes, reverse=True)[: min(max_selected, MOST_BLOCKS)])


@dataclass(frozen=True)
class Read:
    """A group is read to ``at`` in the ring, once those up to the ``after``-th of the order are written back.

    ``after`` -1: at once.
    """

    group: int
    at: int
    after: int


def plan_reads(order: Sequence[int], layout: FileLayout, capacity: int) -> tuple[Read, ...]:
    """Return the reads of a step that updates ``order``, from an empty ring of ``capacity`` elements.

    See [Note: Ring].

    ``after`` never falls from one read to the next, and is less than the read's own place.
    """
    reads: list[Read] = []
    held: deque[tuple[int, int, int]] = deque()  # (place in the order, first element, end), oldest first
    end, after = 0, -1
    for place, group in enumerate(order):
        size = layout.size(group)
        if size > capacity:
            raise ValueError(f"group {group} takes {size} elements of a ring of {capacity}")
        at = 0 if end + size > capacity else end
        end = at + size
        while any(first < end and at < last for _, first, last in held):
            after = held.popleft()[0]
        held.append((place, at, end))
        reads.append(Read(group, at, after))
    return tuple(reads)
