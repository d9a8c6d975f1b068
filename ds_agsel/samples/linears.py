"""The Linears of a model whose matrices can learn from some rows, and how their outputs come to a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from ds_agsel.samples.matrices import Entries, Matrix, WholeMatrix
from ds_agsel.sparse.targets import Target, target_of


def gated_linears(
    layers: Iterable[nn.Module], block_of: Mapping[int, int]
) -> dict[int, list[tuple[Matrix, list[nn.Module]]]]:
    """Return the matrices that can be gated, in the model's order, each with the Linears that use it, by block.

    Args:
        layers: the model's repeated layers.
        block_of: block index by ``id`` of parameter.

    A Linear counts if its forward is `torch.nn.Linear`'s own; with `sparse_grad` also what some entries are trained
    of, by its carrier. Whatever else a weight is used for is not gated.
    """
    found: dict[int, dict[int, tuple[Matrix, list[nn.Module]]]] = {}
    modules = dict.fromkeys(module for layer in layers for module in layer.modules())
    for module in modules:
        matrix = _matrix_of(module)
        if matrix is not None and id(matrix.parameter) in block_of:
            of_block = found.setdefault(block_of[id(matrix.parameter)], {})
            of_block.setdefault(id(matrix.parameter), (matrix, []))[1].append(module)
    return {block: list(matrices.values()) for block, matrices in found.items()}


def _matrix_of(module: nn.Module) -> Matrix | None:
    target = target_of(module)
    if target is not None:
        return Entries(target)
    if not (isinstance(module, nn.Linear) and _is_plain(module)):
        return None
    weight: Any = module.weight
    return WholeMatrix(weight)


def _is_plain(module: nn.Linear) -> bool:
    own = module.__dict__.get("forward")  # of an earlier engine, or of a model that this one was copied from
    of_ours = isinstance(own, GatedForward) or getattr(own, "__func__", None) is nn.Linear.forward
    return type(module).forward is nn.Linear.forward and (own is None or of_ours)


def _own_forward(module: nn.Linear) -> Any:
    return MethodType(nn.Linear.forward, module)


@dataclass(frozen=True)
class Place:
    """A Linear among those of its block: ``number`` is its matrix's."""

    name: str
    block: int
    number: int
    matrix: Matrix


class Gated(Protocol):
    """What stands between a Linear and the choice of rows."""

    def remove(self) -> None:
        """Leave the Linear as it was."""


class GatedForward:
    """A Linear's ``forward`` in place of the class's. A copy of the module, or one that is unpickled, has its own.

    Args:
        tapped: computes the output from the Linear, its place and the input.
    """

    def __init__(self, module: nn.Linear, place: Place, tapped: Callable[[nn.Linear, Place, Tensor], Tensor]) -> None:
        self._module, self._place, self._tapped = module, place, tapped
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, input: Tensor) -> Tensor:  # torch's name: it may be given as a keyword
        """Return the Linear's output, (rows, ..., D_out)."""
        return self._tapped(self._module, self._place, input)

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self._module,)

    def remove(self) -> None:
        """Give the module its class's forward again."""
        if self._module.__dict__.get("forward") is self:
            del self._module.forward


class GatedEntries:
    """The tap of a matrix of which some entries are trained; `Target.tap`. A copy of the target has none.

    Args:
        tapped: computes the output to go on with from the place, the input and the output; None: as without it.
    """

    def __init__(self, target: Target, place: Place, tapped: Callable[[Place, Tensor, Tensor], Tensor | None]) -> None:
        self._target, self._place, self._tapped = target, place, tapped
        target.tap = self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the layer's output ``y``, tapped; None if its rows are not chosen now."""
        return self._tapped(self._place, x, y)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_tap, ()

    def remove(self) -> None:
        """Leave the target without a tap."""
        if self._target.tap is self:
            self._target.tap = None


def _no_tap() -> None:
    return None
