"""One piece of accelerator memory for the states that visit, allocated once, in which gaps are closed by copies.

[Note: Arena] Blocks differ in size by a factor of ten and more. A caching allocator that gives each of them memory of
its own ends with 1.1 to 1.4 times the budget. Here the memory for all of them is one tensor. A tensor of a state takes
the first gap that it fits into. Where the free memory would do and no gap does, all tensors move down, and the gaps
close. These copies stay on the accelerator, where they take a small part of the time that the link needs for what
arrives.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes that kernels read and write at once
_MOST_SPARE_BYTES = 2**26
_SPARE_PART = 32

Key = TypeVar("Key", bound=Hashable)
Room = tuple[int, torch.dtype]  # elements and their dtype


@dataclass(frozen=True)
class Shift(Generic[Key]):
    """A piece of ``num_bytes`` moves down from byte ``start`` to byte ``to``."""

    key: Key
    start: int
    to: int
    num_bytes: int


class Places(Generic[Key]):
    """Which pieces lie where in ``capacity`` bytes; pure."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: dict[Key, tuple[int, int]] = {}  # first byte, end; in the order of places

    def take(self, key: Key, num_bytes: int) -> int | None:
        """Give ``key`` the first gap of ``num_bytes``; return its first byte. None where no gap is as large."""
        end = 0
        for start, next_end in [*self._held.values(), (self.capacity, 0)]:
            if start - end >= aligned(num_bytes):
                self._held[key] = (end, end + aligned(num_bytes))
                self._held = dict(sorted(self._held.items(), key=lambda held: held[1]))
                return end
            end = next_end
        return None

    def start(self, key: Key) -> int:
        """Return the first byte of ``key``."""
        return self._held[key][0]

    def give_back(self, key: Key) -> None:
        """Let other pieces have the place of ``key``."""
        del self._held[key]

    def close_gaps(self) -> Iterator[Shift[Key]]:
        """Move every piece down as far as it goes; yield the moves, to be made in their order."""
        end = 0
        for key, (start, old_end) in list(self._held.items()):
            size = old_end - start
            if start > end:
                self._held[key] = (end, end + size)
                yield Shift(key, start, end, size)
            end += size


def aligned(num_bytes: int) -> int:
    """Return ``num_bytes`` rounded up to the places at which pieces begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def bytes_of(room: Room) -> int:
    """Return the bytes of a tensor of so many elements of that dtype."""
    return room[0] * room[1].itemsize


def capacity_for(budget_bytes: int, pieces: Collection[int]) -> int:
    """Return the bytes that hold any of ``pieces`` (bytes each) that are together within ``budget_bytes``."""
    return min(sum(map(aligned, pieces)), aligned(budget_bytes + len(pieces) * (ALIGNMENT - 1)))


def spare_bytes(capacity: int) -> int:
    """Return the bytes beyond ``capacity`` through which overlapping moves go."""
    return aligned(min(capacity // _SPARE_PART, _MOST_SPARE_BYTES) or 1)


class Arena(Generic[Key]):
    """The memory, and the tensors in it by key. The caller orders its use between streams.

    Args:
        capacity: bytes that pieces may take; a part more is allocated beside them.
        device: name of the device that it is on; allocated now, in the order of the current stream.
    """

    def __init__(self, capacity: int, device: str) -> None:
        self._places: Places[Key] = Places(capacity)
        self._memory = torch.empty(capacity + spare_bytes(capacity), dtype=torch.uint8, device=device)
        self._rooms: dict[Key, Room] = {}
        self.moved_bytes = 0

    @property
    def nbytes(self) -> int:
        """The bytes that are allocated."""
        return self._memory.nbytes

    def take(self, pieces: Mapping[Key, Room]) -> dict[Key, Tensor] | None:
        """Return uninitialised memory for each of ``pieces``; None, and nothing taken, where a gap lacks."""
        taken: list[Key] = []
        for key, room in sorted(pieces.items(), key=lambda piece: -bytes_of(piece[1])):
            if self._places.take(key, bytes_of(room)) is None:
                self.give_back(taken)
                return None
            self._rooms[key] = room
            taken.append(key)
        return {key: self.tensor(key) for key in pieces}

    def tensor(self, key: Key) -> Tensor:
        """Return the piece of ``key`` where it is now, (elements,)."""
        numel, dtype = self._rooms[key]
        empty = torch.empty(0, dtype=dtype, device=self._memory.device)
        start = self._places.start(key) // dtype.itemsize
        return empty.set_(self._memory.untyped_storage(), start, (numel,), (1,))

    def give_back(self, keys: Sequence[Key]) -> None:
        """Free the places of ``keys``."""
        for key in keys:
            self._places.give_back(key)
            del self._rooms[key]

    def close_gaps(self) -> list[Key]:
        """Queue the copies that close all gaps on the current stream; return the keys whose `tensor` has changed."""
        moved = []
        for shift in self._places.close_gaps():
            self._move(shift)
            self.moved_bytes += shift.num_bytes
            moved.append(shift.key)
        return moved

    def _move(self, shift: Shift[Key]) -> None:
        """Copy a piece down, in parts that do not overlap with where they go, or through the spare memory."""
        distance, spare = shift.start - shift.to, self._memory[self._places.capacity :]
        part = max(distance, spare.numel())
        for done in range(0, shift.num_bytes, part):
            numel = min(part, shift.num_bytes - done)
            source = self._memory.narrow(0, shift.start + done, numel)
            target = self._memory.narrow(0, shift.to + done, numel)
            if distance < numel:
                source = spare[:numel].copy_(source)
            target.copy_(source)
