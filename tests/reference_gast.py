"""Choice of rows, row by row: the slow twin that ds_agsel.samples is compared with.

Each row's gradient is made by a backward of its own. Only the draw's random numbers are shared with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ds_agsel.sparse.linear import added_rows
from ds_agsel.sparse.targets import Target

Batch = Mapping[str, Tensor]


def row_gradients(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """The gradient of each row's part of the loss, which is a mean over rows: 1 / rows of the row's own loss."""
    rows = len(next(iter(batch.values())))
    found = []
    for row in range(rows):
        model.zero_grad(set_to_none=True)
        (model(**{key: value[row : row + 1] for key, value in batch.items()}).loss / rows).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


def what_entries_add(target: Target) -> Tensor:
    """What each value of the target's carrier adds to its matrix, which is linear in them: (K, rows, columns)."""
    assert target.support is not None
    units = torch.eye(target.entries)
    return torch.stack([added_rows(unit, target.support, slice(None), target.lines_are_rows) for unit in units])


def gated_names(model: nn.Module, block: Sequence[str]) -> list[str]:
    """The names in ``block`` that are weights of Linears."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in block if name in linears]


def alignment(gradients: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Tensor:
    """The score of each row: its gradient times the mean gradient of the rows in the other half."""
    half = len(gradients) // 2
    scores = []
    for row, own in enumerate(gradients):
        others = gradients[half:] if row < half else gradients[:half]
        mean = {name: sum(g[name] for g in others) / len(others) for name in names}
        scores.append(sum((own[name] * mean[name]).sum() for name in names))
    return torch.stack(scores)


def z(scores: Tensor) -> Tensor:
    """Scores less their mean, by their population standard deviation."""
    return (scores - scores.mean()) / scores.std(correction=0)


def masked_gradient(
    model: nn.Module,
    batch: Batch,
    blocks: Mapping[int, Sequence[str]],
    take: Callable[[int, Tensor], Sequence[int]],
) -> dict[str, Tensor]:
    """The gradient of a micro-batch in which each of ``blocks`` learns from the rows that ``take`` names.

    ``take(block, scores)`` gives the rows of a block. Weights of Linears in ``blocks`` get rows / taken times the sum
    over the taken rows; everything else gets the sum over all.
    """
    gradients = row_gradients(model, batch)
    total = {name: sum(g[name] for g in gradients) for name in gradients[0]}
    for block, members in blocks.items():
        names = gated_names(model, members)
        taken = take(block, alignment(gradients, names))
        for name in names:
            total[name] = sum(gradients[row][name] for row in taken) * len(gradients) / len(taken)
    return total
