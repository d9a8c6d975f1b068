"""Gates: autograd nodes at which a block's rows are chosen, once its Linears' output gradients have come.

[Note: Gates] A Linear of a gated block computes its output and the gradient of its input as ever, over all rows. Only
the gradient of its weight is made otherwise. The weight takes no part in the Linear's own graph; a *tap* on the output
keeps (X, dY) in backward. Each tap depends on the gate's *token*, a scalar, and the token on the block's weights: so
autograd runs the gate once all taps have come, it chooses the rows and returns the masked gradient of each weight, and
what listens to the weights' gradients (ZeRO's hooks) hears them once. Where the choice needs no scores a tap returns
the weight's gradient itself, and nothing is kept.

A weight whose Linear did not run gets a gradient of zero.

[Note: Weights that are not there] ZeRO-3 holds a weight only around its own module; a gate opens and runs when others
of its weights are empty tensors. Nothing here reads them (the token is no view of the weights), but autograd compares
the gradient's shape with the one that the weight had when it entered the graph (torch 2.13, `validate_outputs`), and
looks at its strides when it stores the gradient. In these two moments such a weight shows its whole shape, without
memory: one element, expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_agsel.errors import TrainingError
from ds_agsel.samples.matrices import Matrix
from ds_agsel.samples.scores import Use

Choose = Callable[[dict[int, list[Use]], int], Tensor | None]  # uses by Linear, rows -> taken rows; None: all


class Gate:
    """The gate of one block in one forward.

    Args:
        matrices: of the block's Linears, by which ``choose`` and `tap` number them.
        choose: given (X, dY) of the Linears that ran, returns the taken rows.
        weigh: of (rows, taken), the weight of a taken row.
        done: called when the gate has run.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        choose: Choose,
        weigh: Callable[[int, int], float],
        done: Callable[[Gate], None],
    ) -> None:
        self._matrices, self._choose, self._weigh, self._done = tuple(matrices), choose, weigh, done
        self._parameters = [matrix.parameter for matrix in matrices]
        self._uses: dict[int, list[Use]] = {}
        restore = show_whole(self._parameters)
        self._token: Tensor | None = _Join.apply(self, *self._parameters)
        restore()

    def tap(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """Return the output ``y`` of Linear ``number``, whose input was ``x``, tapped."""
        if self._token is None:
            raise TrainingError("a gate that has run was used again. Begin a new forward.")
        return tap_for(self, self._token, number, x, y)

    def keep(self, number: int, use: Use) -> None:
        """Keep what backward brought to Linear ``number``."""
        self._uses.setdefault(number, []).append(use)

    def gradients(self, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradient over the rows that are chosen now of each matrix that is ``wanted``, and end the gate."""
        found: list[Tensor | None] = []
        rows = next(iter(self._uses.values()))[0].x.shape[0]
        taken = self._choose(self._uses, rows)
        weight = 1.0 if taken is None else self._weigh(rows, taken.numel())
        for number, (matrix, is_wanted) in enumerate(zip(self._matrices, wanted, strict=True)):
            if not is_wanted:
                found.append(None)
                continue
            uses = self._uses.pop(number, [])  # freed one by one
            parameter = self._parameters[number]
            total = matrix.gradient(uses, taken, weight) if uses else _zeros(parameter)
            found.append(total.to(parameter.dtype))
        self.drop()
        self._done(self)
        torch.autograd.Variable._execution_engine.queue_callback(show_whole(self._parameters))
        return found

    def drop(self) -> None:
        """Let go of the graph and of what was kept."""
        self._token = None
        self._uses.clear()


class Keeper(Protocol):
    """What takes (X, dY) of a Linear in backward: a gate, or a pass over support data."""

    def keep(self, number: int, use: Use) -> None:
        """Keep what backward brought to Linear ``number``."""


def tap_for(keeper: Keeper, token: Tensor, number: int, x: Tensor, y: Tensor) -> Tensor:
    """Return the output ``y`` of Linear ``number``, whose input was ``x``; in backward ``keeper`` gets X and dY."""
    tapped: Tensor = _KeptTap.apply(y, x.detach(), token, keeper, number)
    return tapped


class _Join(torch.autograd.Function):
    """Weights -> a token; in backward, the gate's gradients of the weights."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, *weights: Tensor) -> Tensor:
        ctx.gate = gate
        return torch.zeros((), device=weights[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None, *ctx.gate.gradients(ctx.needs_input_grad[1:]))


class _KeptTap(torch.autograd.Function):
    """An output as it is; in backward, its gradient as it is, kept with the input for the gate."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, token: Tensor, keeper: Keeper, number: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.keeper, ctx.number = keeper, number
        return y.detach()  # an output that is no view may be changed in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.keeper.keep(ctx.number, Use(x.to(dy.dtype), dy))
        return dy, None, torch.zeros((), device=dy.device), None, None


class _Tap(torch.autograd.Function):
    """An output as it is; in backward, its gradient as it is, and the matrix's over rows that are known already."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, parameter: Tensor, matrix: Matrix, taken: Tensor | None, row_weight: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix, ctx.taken, ctx.row_weight, ctx.dtype = matrix, taken, row_weight, parameter.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gradient = ctx.matrix.gradient([Use(x.to(dy.dtype), dy)], ctx.taken, ctx.row_weight)
        return dy, None, gradient.to(ctx.dtype), None, None, None


def tap_known(x: Tensor, y: Tensor, matrix: Matrix, taken: Tensor | None, row_weight: float) -> Tensor:
    """Return a Linear's output ``y``; its ``matrix`` learns from the rows ``taken`` of ``x``, from all with None."""
    tapped: Tensor = _Tap.apply(y, x.detach(), matrix.parameter, matrix, taken, row_weight)
    return tapped


def without_weight(module: nn.Linear, x: Tensor) -> Tensor:
    """Return the Linear's output, with no graph to its weight.

    The weight itself goes into the graph, and not a detached copy of it, which would hold ZeRO-3's gathered memory. The
    copy does where a checkpointed layer is computed again: there torch 2.13 keeps a weight that requires no gradient
    as it is (checkpoint.py, `_recomputation_hook`), and ZeRO-3 empties it before it is used.
    """
    weight = module.weight
    if torch._C._current_graph_task_id() != -1:
        return nn.functional.linear(x, weight.detach(), module.bias)
    wanted, weight.requires_grad = weight.requires_grad, False
    try:
        return nn.functional.linear(x, weight, module.bias)
    finally:
        weight.requires_grad = wanted


def show_whole(parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Give those of ``parameters`` that ZeRO-3 does not hold now their whole shape; return what takes it away again."""
    shown: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    for parameter in parameters:
        shape = _whole_shape(parameter)
        if parameter.shape != shape:
            before, stand_in = parameter.data, parameter.data.new_zeros(()).expand(shape)
            parameter.data = stand_in
            shown.append((parameter, before, stand_in))

    def restore() -> None:
        for parameter, before, stand_in in shown:
            if parameter.data_ptr() == stand_in.data_ptr():  # ZeRO has not brought it since
                parameter.data = before

    return restore


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(_whole_shape(parameter), dtype=parameter.dtype, device=parameter.device)
