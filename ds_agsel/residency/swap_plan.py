"""The places of states in a file on NVMe and in its buffers: pure, by group and bytes, without tensors.

[Note: Ring] The groups of a step pass through one stretch of buffers, used as a ring in the order of their update: a
group is read to where the oldest ones lay, as soon as those have been written back. Only the
ring's size limits how far reading runs ahead of the update; it must hold the largest group.

[Note: Two stretches] A group has a stretch for what rests of its master weights, which is read before its first update,
and one behind it for its moments' tensors, which is read with it from then on. Both begin and end where direct I/O can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds_agsel.residency.arena import aligned

MOST_BLOCKS = 4  # in host memory at once: one is written back, one is updated, two are read ahead


@dataclass(frozen=True)
class FileLayout:
    """Where each group's tensors lie in a rank's file, in bytes.

    Attributes:
        sizes: of each tensor of each group by name, that of the master weights first.
        alignment: bytes that places and sizes of stretches are multiples of, as direct I/O requires.
    """

    sizes: Mapping[int, Mapping[str, int]]
    alignment: int

    def master_size(self, group: int) -> int:
        """Return the bytes of the first stretch of ``group``, padding included."""
        return self._padded(next(iter(self.sizes[group].values())))

    def size(self, group: int) -> int:
        """Return the bytes that ``group`` takes in the file and in the ring, padding included."""
        _, *moments = self.sizes[group].values()
        return self.master_size(group) + self._padded(sum(map(aligned, moments)))

    def places(self, group: int) -> dict[str, int]:
        """Return where each tensor of ``group`` begins, from the group's own beginning."""
        master, *moments = self.sizes[group]
        found, end = {master: 0}, self.master_size(group)
        for name in moments:
            found[name] = end
            end += aligned(self.sizes[group][name])
        return found

    def starts(self) -> dict[int, int]:
        """Return where each group begins in the file."""
        found, end = {}, 0
        for group in self.sizes:
            found[group] = end
            end += self.size(group)
        return found

    def total(self) -> int:
        """Return the bytes that all groups take in the file, once each has been updated."""
        return sum(map(self.size, self.sizes))

    def _padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment


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
    """Return the reads of a step that updates ``order``, from an empty ring of ``capacity`` bytes.

    See [Note: Ring].

    ``after`` never falls from one read to the next, and is less than the read's own place.
    """
    reads: list[Read] = []
    held: deque[tuple[int, int, int]] = deque()  # (place in the order, first byte, end), oldest first
    end, after = 0, -1
    for place, group in enumerate(order):
        size = layout.size(group)
        if size > capacity:
            raise ValueError(f"group {group} takes {size} bytes of a ring of {capacity}")
        at = 0 if end + size > capacity else end
        end = at + size
        while any(first < end and at < last for _, first, last in held):
            after = held.popleft()[0]
        held.append((place, at, end))
        reads.append(Read(group, at, after))
    return tuple(reads)
