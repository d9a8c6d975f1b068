"""Which rows each step trains on, a pure function of its number, and how they become padded tensors."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ds_agsel.errors import DataError

IGNORED = -100  # the label of a token that the loss is not on, as in torch.nn.functional.cross_entropy
_BATCHES_PER_BUCKET = 16  # rows are sorted by length among so many batches: more pads less, and shuffles less


@dataclass(frozen=True)
class Batching:
    """How many rows go into one step: ``accumulation`` micro-batches of ``micro_batch`` rows on each rank."""

    micro_batch: int
    accumulation: int
    world_size: int

    @property
    def rows_per_step(self) -> int:
        """Rows of all ranks and micro-steps together."""
        return self.micro_batch * self.accumulation * self.world_size


class EpochPlan:
    """The rows of every step, a function of (seed, step): nothing to save, and nothing to skip on a resume.

    Each epoch shuffles anew, sorts by length among neighbours, so that little is padded, and shuffles the
    batches. Rows that fill no whole batch are left out of the epoch; other ones in the next.
    """

    def __init__(self, lengths: np.ndarray, batching: Batching, seed: int) -> None:
        if len(lengths) < batching.rows_per_step:
            raise DataError(
                f"The train split has {len(lengths)} rows and one step takes {batching.rows_per_step} "
                f"({batching.micro_batch} a rank × {batching.world_size} ranks × {batching.accumulation} "
                f"micro-steps). "
                "Use more data or a smaller batch."
            )
        self._lengths = lengths
        self._batching = batching
        self._seed = seed
        self._epoch = -1
        self._batches = np.empty(0)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data."""
        return len(self._lengths) // self._batching.rows_per_step

    def rows_of(self, step: int) -> np.ndarray:
        """Return the row indices of ``step``, int64, (accumulation, world_size, micro_batch); of like length each."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = self._draw(epoch)
            self._epoch = epoch
        b = self._batching
        return self._batches[index].reshape(b.accumulation, b.world_size, b.micro_batch)

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        size = self._batching.rows_per_step
        order = rng.permutation(len(self._lengths))[: self.steps_per_epoch * size]
        for start in range(0, len(order), size * _BATCHES_PER_BUCKET):
            bucket = order[start : start + size * _BATCHES_PER_BUCKET]
            order[start : start + len(bucket)] = bucket[np.argsort(self._lengths[bucket], kind="stable")]
        return order.reshape(-1, size)[rng.permutation(self.steps_per_epoch)]


def pack(lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Put examples into rows of at most ``capacity`` tokens, longest first, each where it fits best."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the pack), ascending
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            packs.append([])
            left, index = capacity, len(packs) - 1
        else:
            left, index = room.pop(place)
        packs[index].append(example)
        bisect.insort(room, (left - length, index))
    return [tuple(members) for members in packs]


def collate(
    rows: Sequence[Sequence[Mapping[str, Any]]], pad_token_id: int, *, packed: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of examples (one each, several where ``packed``) to tensors padded on the right to the longest.

    Returns ``input_ids`` and ``labels`` int64 (num_rows, T), labels being IGNORED on prompts and padding, and
    ``attention_mask`` int64 (num_rows, T); for packed rows instead ``position_ids`` (num_rows, T), which
    start anew in each example, and ``attention_mask`` bool (num_rows, 1, T, T): each token sees its own
    example up to itself.
    """
    longest = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    owner = torch.zeros(shape, dtype=torch.int64)  # which example of its row a token belongs to, from 1; 0 is padding
    positions = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            ids = torch.as_tensor(example["input_ids"], dtype=torch.int64)
            end, completion = start + len(ids), start + int(example["prompt_numel"])
            input_ids[index, start:end] = ids
            labels[index, completion:end] = input_ids[index, completion:end]
            owner[index, start:end] = number
            positions[index, start:end] = torch.arange(len(ids))
            start = end
    if not packed:
        return {"input_ids": input_ids, "labels": labels, "attention_mask": (owner > 0).long()}
    same = owner.unsqueeze(2) == owner.unsqueeze(1)  # padding sees padding, so that no row of the mask is empty
    mask = (same & torch.ones(longest, longest, dtype=torch.bool).tril()).unsqueeze(1)
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
