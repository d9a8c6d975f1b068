"""Page-locked host memory for many tensors at once, in few pieces that no allocator makes larger.

[Note: Slab] Torch's caching host allocator takes a power of two for each request, and keeps what is freed for requests
of that size. The states of Qwen2.5-7B are 85 GiB, and would take 108 if each of their tensors were allocated by itself.
Here tensors are cut out of pieces whose sizes are powers of two or little less, which are allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_agsel.residency import page_locked
from ds_agsel.residency.arena import Room, aligned, bytes_of


@dataclass(frozen=True)
class SlabPlan:
    """Where tensors lie in pieces of memory.

    Attributes:
        pieces: bytes of each piece.
        places: (piece, first byte) of each tensor, in the order in which their sizes were given.
    """

    pieces: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def taken_bytes(self) -> int:
        """The bytes that torch's caching host allocator takes: each piece rounded up to a power of two."""
        return sum(power_of_two_above(piece) for piece in self.pieces)


def plan_slab(sizes: Sequence[int]) -> SlabPlan:
    """Return pieces for tensors of ``sizes``, in bytes: the largest power of two within the rest, again and again.

    A piece is larger than that only where a single tensor is. Within a piece the larger tensors come first.
    """
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    left = sorted((index for index, size in enumerate(sizes) if size), key=lambda index: (-sizes[index], index))
    pieces: list[int] = []
    while left:
        rest = sum(aligned(sizes[index]) for index in left)
        room = max(power_of_two_above(aligned(sizes[left[0]])), 1 << (rest.bit_length() - 1))
        end, waiting = 0, []
        for index in left:
            size = aligned(sizes[index])
            if end + size <= room:
                places[index] = (len(pieces), end)
                end += size
            else:
                waiting.append(index)
        pieces.append(end)
        left = waiting
    return SlabPlan(tuple(pieces), tuple(places))


class Slab:
    """Uninitialised tensors, (elements,), in page-locked memory for copies to and from ``device``.

    Each has a storage of its own, which a checkpoint writes without its neighbours.

    Args:
        rooms: (elements, dtype) of each tensor.
        device: a DeepSpeed accelerator object. Where memory can't be locked for it, it is pageable, with one warning.
    """

    def __init__(self, rooms: Sequence[Room], device: Any) -> None:
        self.plan = plan_slab([bytes_of(room) for room in rooms])
        self._rooms = tuple(rooms)
        self._pieces = [page_locked.empty_if_possible(size, torch.uint8, device) for size in self.plan.pieces]

    def tensor(self, index: int) -> Tensor:
        """Return tensor ``index``. It keeps the memory alive."""
        numel, dtype = self._rooms[index]
        if not numel:
            return torch.empty(0, dtype=dtype)
        piece, first = self.plan.places[index]
        memory = memoryview(self._pieces[piece].numpy().data)[first : first + numel * dtype.itemsize]
        return torch.frombuffer(memory, dtype=dtype)


def locked_copies(tensors: Sequence[Tensor], device: Any) -> list[Tensor]:
    """Return copies of ``tensors``, flat, in one `Slab`."""
    slab = Slab([(tensor.numel(), tensor.dtype) for tensor in tensors], device)
    return [slab.tensor(index).copy_(tensor.detach().view(-1)) for index, tensor in enumerate(tensors)]


def power_of_two_above(size: int) -> int:
    """Return what torch's caching host allocator takes for ``size`` bytes, at least 1."""
    return 1 << (size - 1).bit_length()
