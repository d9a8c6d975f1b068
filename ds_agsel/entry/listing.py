"""The units of granularity "module", and the matrices of sparse_grad, for `ds-agsel check`: alike ones in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch

from ds_agsel.blocks import Block, pattern_of
from ds_agsel.config import SelectionConfig
from ds_agsel.entry.preparation import prepare
from ds_agsel.sparse.targets import Target, find_targets


def lines(model: torch.nn.Module, config: SelectionConfig) -> list[str]:
    """Return what ``config``, which is sound, makes of ``model``: its units, or the matrices of ``sparse_grad``.

    Nothing with granularity "block" and without ``sparse_grad``.

    Units are grouped by what a step does with them and by the pattern that names them in always_select and
    never_select.
    """
    if config.sparse_grad is not None:
        return _matrices(find_targets(model, config.sparse_grad))
    if config.granularity == "block":
        return []
    prepared = prepare(model, config, None, None, config.steps_per_epoch or 1)
    lottery, units = prepared.lottery, prepared.blocks
    drawn = sum(units[index].numel for index in lottery.drawn)
    found = [f'granularity "module": {len(units)} units']
    share = prepared.bound.lottery and lottery.share
    limit = f", of which a step updates at most {share.limit:,} ({config.select_percent:g} %)" if share else ""
    found += _group(units, lottery.drawn, f"in the lottery, {drawn:,} parameters{limit}")
    found += _group(units, lottery.always, "updated at every step")
    found += _group(units, lottery.never, "not trained, unless always_select names them")
    return found


def _matrices(targets: Sequence[Target]) -> list[str]:
    total = sum(target.shape[0] * target.shape[1] for target in targets)
    trained = sum(target.entries for target in targets)
    found = [
        f"sparse_grad: {trained:,} entries of the {total:,} of {len(targets)} matrices are trained, and all of the "
        "rest of a selected block:"
    ]
    kinds = Counter((target.kind, target.shape, target.entries) for target in targets)
    return found + [
        f"    {count:>4} x {entries:>11,} of {rows:>6} x {columns:<6}  {kind}"
        for (kind, (rows, columns), entries), count in kinds.items()
    ]


def _group(units: tuple[Block, ...], indices: Collection[int], title: str) -> Iterator[str]:
    if not indices:
        return
    yield f"  {title}:"
    alike: dict[tuple[str, int], int] = {}
    for index in indices:
        key = pattern_of(units[index]), units[index].numel
        alike[key] = alike.get(key, 0) + 1
    for (pattern, numel), count in alike.items():
        yield f"    {count:>4} x {numel:>13,}  {pattern}"
