"""Rows with wrong labels are the ones that blocks refuse: a small model on a small task, with the truth kept aside."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from support import Case, build

ROWS, MICRO, WRONG, LENGTH, VOCABULARY = 256, 16, 0.3, 8, 37
LEARNED, STEPS = 40, 100  # steps until the task is known a little, and steps that are looked at


def rows() -> tuple[list[dict[str, torch.Tensor]], set[int]]:
    """Pairs of a token and its image under a fixed permutation, to be predicted; and the rows that have random ones."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randperm(VOCABULARY, generator=generator)
    found, wrong = [], set(torch.randperm(ROWS, generator=generator)[: int(WRONG * ROWS)].tolist())
    for row in range(ROWS):
        tokens = torch.randint(VOCABULARY, (LENGTH // 2,), generator=generator)
        images = torch.randint(VOCABULARY, (LENGTH // 2,), generator=generator) if row in wrong else image[tokens]
        ids = torch.stack((tokens, images), 1).flatten()
        labels = ids.clone()
        labels[::2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found, wrong


def refused(draw: str) -> tuple[float, float]:
    """z of the wrong rows' share among the taken, a step's mean over its blocks being one observation; that share."""
    data, wrong = rows()
    section = {"policy": "all", "gast": {"draw": draw}}
    config = {"train_micro_batch_size_per_gpu": MICRO}
    engine = build(Case(section=section, config=config))
    generator, differences, shares = torch.Generator().manual_seed(1), [], []
    for number in range(LEARNED + STEPS):
        members = torch.randperm(ROWS, generator=generator)[:MICRO].tolist()
        engine.selection.samples.name_rows(members)
        engine.backward(engine(**{key: torch.stack([data[m][key] for m in members]) for key in data[0]}).loss)
        engine.step()
        step = engine.selection.samples.history[-1]
        bad = [row for row, member in enumerate(members) if member in wrong]
        of_blocks = [len(set(step.taken(block)[0]) & set(bad)) / (MICRO // 2) for block in step.blocks]
        if number >= LEARNED:
            differences.append(statistics.fmean(of_blocks) - len(bad) / MICRO)
            shares.append(statistics.fmean(of_blocks))
    engine.destroy()
    z = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(len(differences)))
    return z, statistics.fmean(shares)


@pytest.mark.parametrize("draw", ["sample", pytest.param("top", marks=pytest.mark.slow)])
def test_wrong_rows_are_refused(workers: Any, draw: str) -> None:
    [(z, share)] = workers(1).run(refused, draw)
    assert z < -4 and share < WRONG


def test_random_rows_do_not_know(workers: Any) -> None:
    [(z, _)] = workers(1).run(refused, "random")
    assert abs(z) < 4.5
