"""Support data: a few rows, drawn at each step, whose gradients the rows of the step are scored against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ds_agsel.errors import ConfigError, DataError
from ds_agsel.gast_section import GastConfig
from ds_agsel.samples.matrices import Matrix
from ds_agsel.samples.scores import Support, Use

_PURPOSE = 0x73757070  # keeps these draws apart from those of blocks and rows


class SupportData:
    """The user's support data, and the rows of it that a step uses: a function of (seed, step, rank).

    Args:
        data: rows, as a map-style dataset or a sequence; each what ``collate`` takes.
        collate: rows -> the keyword arguments of the model's forward; None: torch's `default_collate`.

    Raises ConfigError for data that has no length or no row.
    """

    def __init__(
        self, data: Any, collate: Callable[[list[Any]], Any] | None, config: GastConfig, seed: int, rank: int
    ) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or len(data) == 0:
            raise ConfigError(
                f"initialize(support_data={type(data).__name__}) has no rows that can be drawn by their index. Give a "
                "map-style dataset or a list of rows, at least one."
            )
        self._data, self._collate = data, collate or default_collate
        self._rows, self._seed, self._rank = min(config.support_samples, len(data)), seed, rank

    def indices(self, step: int) -> list[int]:
        """Return the rows of ``step``, distinct."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_PURPOSE, self._seed, step, self._rank])))
        return [int(index) for index in rng.choice(len(self._data), self._rows, replace=False)]

    def batch(self, step: int) -> Mapping[str, Any]:
        """Return the batch of ``step``. Raises DataError where it is no dict."""
        batch = self._collate([self._data[index] for index in self.indices(step)])
        if not isinstance(batch, Mapping):
            raise DataError(
                f"the batch of support_data is a {type(batch).__name__}, not a dict of the model's arguments. Give "
                "rows that are dicts, or initialize(collate_fn=...)."
            )
        return batch


class SupportPass:
    """What a pass over support rows brings to the Linears, by block and number; taps `keep` it."""

    def __init__(self, device: torch.device) -> None:
        self.token = torch.zeros((), device=device, requires_grad=True)
        self._found: dict[int, dict[int, list[Support]]] = {}

    def of_block(self, block: int, matrices: Sequence[Matrix]) -> BlockSupport:
        """Return where the Linears of ``block``, whose ``matrices`` these are, leave their support."""
        return BlockSupport(matrices, self._found.setdefault(block, {}))

    def run(self, loss: Tensor) -> None:
        """Take the gradients of ``loss`` at all taps. No parameter gets one, and no hook of a parameter is called."""
        torch.autograd.grad(loss, self.token, allow_unused=True)

    @property
    def is_empty(self) -> bool:
        """Whether no Linear was reached."""
        return not any(self._found.values())

    def scores(self, block: int, matrices: Sequence[Matrix], uses: Mapping[int, Sequence[Use]]) -> Tensor:
        """Return the score of each row of ``uses`` against the support, fp32, (rows,); 0 where there is none."""
        found = self._found.get(block, {})
        parts = [
            matrices[number].against(of_linear, support)
            for number, of_linear in uses.items()
            for support in found.get(number, ())
        ]
        some = next(iter(uses.values()))[0].dy
        return torch.stack(parts).sum(0) if parts else torch.zeros(some.shape[0], device=some.device)


class BlockSupport:
    """Takes (X, dY) of the Linears of a block in a support pass."""

    def __init__(self, matrices: Sequence[Matrix], found: dict[int, list[Support]]) -> None:
        self._matrices, self._found = matrices, found

    def keep(self, number: int, use: Use) -> None:
        """Keep the support that Linear ``number`` gives."""
        self._found.setdefault(number, []).append(self._matrices[number].support_of([use]))


def loss_of(output: Any) -> Tensor:
    """Return the loss in a model's output. Raises DataError where it has none."""
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DataError(
            "the model's output for the support data has no loss. Give rows with labels, as the model's forward "
            'computes the loss from, or use adagrad_select.gast.support="batch".'
        )
    return loss
