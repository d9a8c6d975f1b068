"""The Linears of a model whose weights can learn from some rows, and their forward, which asks for a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn


def gated_linears(
    layers: Iterable[nn.Module], block_of: Mapping[int, int]
) -> dict[int, list[tuple[nn.Parameter, list[nn.Linear]]]]:
    """Return the weights that can be gated, in the model's order, each with the Linears that use it, by block.

    Args:
        layers: the model's repeated layers.
        block_of: block index by ``id`` of parameter.

    A Linear counts if its forward is `torch.nn.Linear`'s own. Whatever else a weight is used for is not gated.
    """
    found: dict[int, dict[int, tuple[nn.Parameter, list[nn.Linear]]]] = {}
    modules = dict.fromkeys(module for layer in layers for module in layer.modules())
    for module in modules:
        if isinstance(module, nn.Linear) and _is_plain(module) and id(module.weight) in block_of:
            of_block = found.setdefault(block_of[id(module.weight)], {})
            weight: Any = module.weight
            of_block.setdefault(id(weight), (weight, []))[1].append(module)
    return {block: list(weights.values()) for block, weights in found.items()}


def _is_plain(module: nn.Linear) -> bool:
    own = module.__dict__.get("forward")  # of an earlier engine, or of a model that this one was copied from
    of_ours = isinstance(own, GatedForward) or getattr(own, "__func__", None) is nn.Linear.forward
    return type(module).forward is nn.Linear.forward and (own is None or of_ours)


def _own_forward(module: nn.Linear) -> Any:
    return MethodType(nn.Linear.forward, module)


class GatedForward:
    """A Linear's ``forward`` in place of the class's. A copy of the module, or one that is unpickled, has its own.

    Args:
        number: of its weight among the block's.
        tapped: computes the output from this and the input.
    """

    def __init__(
        self, module: nn.Linear, name: str, block: int, number: int, tapped: Callable[[GatedForward, Tensor], Tensor]
    ) -> None:
        self.module, self.name, self.block, self.number, self._tapped = module, name, block, number, tapped
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, input: Tensor) -> Tensor:  # torch's name: it may be given as a keyword
        """Return the Linear's output, (rows, ..., D_out)."""
        return self._tapped(self, input)

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.module,)

    def remove(self) -> None:
        """Give the module its class's forward again."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
