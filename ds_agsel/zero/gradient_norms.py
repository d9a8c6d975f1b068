"""Norms of a step's gradients, taken once: for block scores, for clipping and for the overflow check.

[Note: One norm] A norm, summed in fp64 (fp32 on some accelerators), is finite exactly if its gradient is, so that no
other pass looks for inf and NaN. Where DeepSpeed takes a norm, an all-reduce and a host wait for each group, all
norms of a step are taken in one batch here, and added up over the ranks in one all-reduce. What an explore step has
taken for its scores serves its clipping too. Sums have DeepSpeed's own dtypes and order within a group, so that with
every block selected the bits are plain DeepSpeed's (of the sum over more than two ranks the order is the collective's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_agsel.residency import page_locked
from ds_agsel.selection import Selection
from ds_agsel.zero import block_scores, compat


def l2_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each of ``gradients``, of no dimension, in the dtype that DeepSpeed takes norms in.

    CUDA's kernels sum in that dtype without a copy of a gradient in it, 8 bytes an element in mid-backward. On a CPU
    torch makes one.
    """
    if not gradients:
        return []
    return list(torch._foreach_norm(list(gradients), 2, dtype=compat.norm_dtype()))


class Squares:
    """Squared norms of the whole batch's gradients on their way to the host.

    Args:
        keys: what each belongs to: a parameter's number, or `key_of_group` of a group.
        squares: (len(keys),), in fp64, on the accelerator, added up over the ranks.
        buffer: page-locked memory of the same form that nothing else uses until `get`; None to wait for the copy.
    """

    def __init__(self, keys: Sequence[int], squares: Tensor, buffer: Tensor | None) -> None:
        self._keys = keys
        self._event = None
        if squares.device.type != "cpu" and buffer is not None:
            buffer.copy_(squares, non_blocking=True)
            self._event = get_accelerator().Event()
            self._event.record(get_accelerator().current_stream())
            squares = buffer
        self._squares = squares

    def has_arrived(self) -> bool:
        """Return whether `get` would not wait."""
        if self._event is not None and self._event.query():
            self._event = None
        return self._event is None

    def get(self) -> dict[int, float]:
        """Return the squares by key. The host waits for what was queued up to their copy, and for no more."""
        if not self.has_arrived() and self._event is not None:
            self._event.synchronize()
            self._event = None
        return dict(zip(self._keys, self._squares.tolist(), strict=True))


def key_of_group(group: int) -> int:
    """Return the key of the sum of a group's squares, another than any parameter's, which are 0 or more."""
    return ~group


class BlockScores:
    """Scores of blocks on their way to the host; see `explore_stream.Scores`."""

    def __init__(self, squares: Squares, score: Callable[[dict[int, float]], dict[int, float]]) -> None:
        self._squares, self._score = squares, score

    def has_arrived(self) -> bool:
        """Return whether `get` would not wait."""
        return self._squares.has_arrived()

    def get(self) -> dict[int, float]:
        """Return them by block, and let the step know the squares."""
        return self._score(self._squares.get())


class GradientNorms(compat.ZeROOptimizer):
    """What a restricted optimizer knows of the norms of this window's gradients; see [Note: One norm]."""

    selection: Selection
    _group_of_param: Mapping[int, int]
    _block_of_group: Sequence[int]
    _shown_groups: Sequence[int]

    def _attach_norms(self) -> None:
        self._numbers_of_group: dict[int, list[int]] = {}
        for number in sorted(self._group_of_param):
            self._numbers_of_group.setdefault(self._group_of_param[number], []).append(number)
        self._host_squares: Tensor | None = None
        self._local_norms: dict[int, list[tuple[int, Tensor]]] | None = None  # by group, in ascending order
        self._forget_norms()

    def _forget_norms(self) -> None:
        """Forget all norms: gradients have changed, or are gone."""
        self._taken = 0  # numbers of `_host_squares` that this window uses
        self._squares: dict[int, float] = {}  # what an explore step has been scored by, by the keys of `Squares`
        self._gradients_were_set()

    def _gradients_were_set(self) -> None:
        """Take the norm anew for clipping: gradients are not those that were scored."""
        self._squares_hold = False
        self._norm: Tensor | None = None
        self._host_norm: Tensor | None = None
        self._scale: tuple[Tensor | None, Tensor | float | None] | None = None

    # --------------------------------------------------- what each stage does its way

    def _known_norms(self, group: int) -> list[tuple[int, Tensor]]:
        """Return (number, L2 norm) of this rank's slices of ``group`` whose norm was taken before they were moved."""
        raise NotImplementedError

    def _slices(self, group: int) -> list[tuple[int, Tensor]]:
        """Return (number, slice) of each other gradient of ``group`` that this rank holds a part of."""
        raise NotImplementedError

    def _updates_on_host(self) -> bool:
        """Return whether ZeRO-Offload keeps the gradients that the step reads on the host."""
        raise NotImplementedError

    def _norm_sum_dtype(self) -> torch.dtype:
        """Return the dtype in which DeepSpeed adds squared norms up over the ranks."""
        return torch.float32

    # -------------------------------------------------------------------------- scores

    def _slice_norms(self, groups: Iterable[int]) -> dict[int, list[tuple[int, Tensor]]]:
        """Return by group (number, norm of no dimension, on the accelerator) of this rank's slices. One batch."""
        norms = {group: self._known_norms(group) for group in groups}
        slices = [(group, number, piece) for group in norms for number, piece in self._slices(group)]
        for (group, number, _), norm in zip(slices, l2_norms([piece for *_, piece in slices]), strict=True):
            norms[group].append((number, norm))
        return norms

    def _squares_of(self, groups: Sequence[int], buffered: bool = False) -> Squares:
        """Return the squared norms of ``groups`` and of their parameters, 0 without a gradient. Collective.

        One all-reduce. With ``buffered`` the host does not wait, and each group may be asked for once a window.
        """
        numbers = [number for group in groups for number in self._numbers_of_group.get(group, ())]
        device, dtype = get_accelerator().current_device_name(), compat.norm_dtype()
        taken = self._slice_norms(groups)
        found = {number: norm for norms in taken.values() for number, norm in norms}
        nothing = torch.zeros((), dtype=dtype, device=device) if len(found) < len(numbers) else None
        norms = [found.get(number, nothing) for number in numbers]
        squares = torch.stack([norm.to(device, dtype) for norm in norms if norm is not None]).square()
        # A rank's sum is rounded as it is without scores; with two ranks so is the sum of both.
        squares = torch.cat([squares, self._sums(list(taken.values())).to(dtype)])
        if dist.get_world_size(group=self.dp_process_group) > 1:
            dist.all_reduce(squares, group=self.dp_process_group)
        keys = [*numbers, *map(key_of_group, groups)]
        return Squares(keys, squares, self._buffer(len(keys)) if buffered else None)

    def _buffer(self, count: int) -> Tensor | None:
        """Return page-locked memory for ``count`` numbers that no other call in this window gets; None on a CPU."""
        if get_accelerator().device_name() == "cpu":
            return None
        if self._host_squares is None:
            count_of_all = len(self._group_of_param) + len(self._block_of_group)
            self._host_squares = page_locked.empty(count_of_all, compat.norm_dtype(), get_accelerator())
        start, self._taken = self._taken, self._taken + count
        return self._host_squares.narrow(0, start, count)

    def _scores(self) -> Tensor:
        """Return the score of each block whose gradients are there, (num_blocks,), fp64, on the host. Collective."""
        blocks, known = set(self.selection.active_blocks), self._squares
        of_blocks = [group for group, block in enumerate(self._block_of_group) if block in blocks]
        missing = [group for group in of_blocks if key_of_group(group) not in known]
        if missing:
            self._note_squares(self._squares_of(missing).get())
        return self._scores_of(self._squares)

    def _start_scores(self, blocks: Sequence[int]) -> BlockScores:
        """Start to score ``blocks``, all of whose gradients have come, in mid-backward. Collective; no host wait."""
        groups = [group for group, block in enumerate(self._block_of_group) if block in blocks]

        def score(squares: dict[int, float]) -> dict[int, float]:
            self._note_squares(squares)
            scores = self._scores_of(squares)
            return {block: float(scores[block]) for block in blocks}

        return BlockScores(self._squares_of(groups, buffered=True), score)

    def _note_squares(self, squares: Mapping[int, float]) -> None:
        self._squares.update(squares)
        self._squares_hold = True

    def _scores_of(self, squares: Mapping[int, float]) -> Tensor:
        """Return `block_scores.combine` of ``squares``, the loss scale removed: (num_blocks,), fp64, on the host."""
        numbers = sorted(key for key in squares if key >= 0)
        norms = torch.tensor([squares[number] for number in numbers], dtype=torch.float64).sqrt() / self.loss_scale
        owners = [self._block_of_group[self._group_of_param[number]] for number in numbers]
        numels = [block.numel for block in self.selection.blocks]
        return block_scores.combine(norms, owners, numels, self.selection.config.score)

    # -------------------------------------------------------------- clipping, overflow

    def _global_norm(self) -> Tensor:
        """Return the L2 norm of the gradients of the shown groups, infinite if it is not finite. Collective.

        On the accelerator, so that nothing waits, or on the host where it is known there. Taken once a step.
        """
        if self._host_norm is not None:
            return self._host_norm
        if self._norm is None:
            norms = self._group_norms()
            norm = torch.linalg.vector_norm(norms)
            self._norm = torch.where(torch.isfinite(norms).all(), norm, torch.full_like(norm, math.inf))
        return self._norm

    def _take_norms(self, groups: Sequence[int]) -> None:
        """Take the norms of the gradients that the step will apply, before DeepSpeed is shown ``groups`` alone."""
        self._norm = self._host_norm = self._scale = None
        self._local_norms = None
        is_known = self._squares_hold and all(key_of_group(group) in self._squares for group in groups)
        if self._needs_norm() and not is_known:
            self._local_norms = self._slice_norms(sorted(groups))

    def _needs_norm(self) -> bool:
        """Return whether DeepSpeed clips by the norm, reports it or looks for overflow."""
        return True

    def _group_norms(self) -> Tensor:
        """Return the norm of each shown group, (groups,), in the groups' order, not in that of the update. Collective.

        One all-reduce; none where an explore step's scores have told all.
        """
        if self._local_norms is None:
            known = [self._squares[key_of_group(group)] for group in sorted(self._shown_groups)]
            return self._roots(torch.tensor(known, dtype=torch.float64).to(self._norm_sum_dtype()))
        sums = self._sums(list(self._local_norms.values()))
        if dist.get_world_size(group=self.dp_process_group) > 1:
            dist.all_reduce(sums, group=self.dp_process_group)
        return self._roots(sums)

    def _roots(self, sums: Tensor) -> Tensor:
        """Return the square roots of ``sums``, (groups,), rounded as DeepSpeed's are."""
        return sums.sqrt()

    def _sums(self, norms: Sequence[Sequence[tuple[int, Tensor]]]) -> Tensor:
        """Return the sums of squares of each list of ``norms``: (len(norms),), on the accelerator."""
        device, dtype = get_accelerator().current_device_name(), compat.norm_dtype()
        every = [norm.to(device, dtype) for of_group in norms for _, norm in of_group]
        if not every:
            return torch.zeros(len(norms), dtype=self._norm_sum_dtype(), device=device)
        parts = torch.stack(every).square().split([len(of_group) for of_group in norms])
        sums = torch.stack([part.sum() if len(part) != 1 else part[0] for part in parts])
        return sums.to(self._norm_sum_dtype())

    def _is_overflow(self) -> bool:
        """Return whether a shown gradient is not finite, on any rank. Collective. The host waits, once a step."""
        self._host_norm = self._global_norm().cpu()
        return not math.isfinite(float(self._host_norm))

    def _clip_factor(self, total_norm: Tensor | None) -> Tensor | float | None:
        """Return what gradients are multiplied by to remove the loss scale and to clip; None where that is 1.

        DeepSpeed's arithmetic (stage_1_and_2.py:3193), once a step instead of once a group, and on the device on which
        DeepSpeed does it: CUDA divides by a number by multiplying with its reciprocal, which may be off by a bit.
        """
        if self._scale is None or self._scale[0] is not total_norm:
            self._scale = total_norm, self._combined_factor(total_norm)
        return self._scale[1]

    def _combined_factor(self, total_norm: Tensor | None) -> Tensor | float | None:
        if self.clip_grad <= 0.0 or total_norm is None:
            return 1.0 / self.loss_scale if self.loss_scale != 1.0 else None
        if total_norm is self._host_norm and self._norm is not None and not self._updates_on_host():
            total_norm = self._norm
        clip = torch.clamp(((total_norm / self.loss_scale) + 1e-6) / self.clip_grad, min=1.0)
        factor = 1.0 / (clip * self.loss_scale)
        if not self._updates_on_host():
            return factor
        known = float(factor)
        return None if known == 1.0 else known
