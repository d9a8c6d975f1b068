"""A model's shape: how many elements each parameter of each block has. Read from its config, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_agsel.blocks import Block, repeated_layers
from ds_agsel.config import Granularity
from ds_agsel.estimate.models import build_on_meta
from ds_agsel.param_groups import as_param_groups, split_param_groups
from ds_agsel.units import find_units

Numels = tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """Elements of every parameter, in the order in which ZeRO flattens them.

    Attributes:
        blocks: in the model's order, or its units.
        groups: the param groups that ds_agsel makes, one per block and hyperparameter set.
        block_of_group: the block of each of them.
        user_groups: the groups that plain DeepSpeed is given.
        frozen: parameters that are not trained.
        linears: (inputs, outputs) of each linear layer inside the repeated layers.
    """

    name: str
    blocks: tuple[Block, ...]
    groups: tuple[Numels, ...]
    block_of_group: tuple[int, ...]
    user_groups: tuple[Numels, ...]
    frozen: Numels = ()
    linears: tuple[tuple[int, int], ...] = ()

    @property
    def numel(self) -> int:
        """All of the model's elements, frozen ones too."""
        return sum(map(sum, self.groups)) + sum(self.frozen)

    @property
    def units(self) -> str:
        """What `blocks` are, for a text: "blocks", or with granularity "module" "units"."""
        return "blocks" if all(block.kind == "block" for block in self.blocks) else "units"

    def lora(self, rank: int) -> Numels:
        """Return the sizes of LoRA adapters on every linear layer: ``rank`` × inputs and outputs × ``rank`` each."""
        return tuple(numel for inputs, outputs in self.linears for numel in (rank * inputs, outputs * rank))


def shape_of(
    name: str,
    model: nn.Module,
    overrides: Mapping[str, Sequence[str]] | None = None,
    model_parameters: Any = None,
    granularity: Granularity = "block",
) -> ModelShape:
    """Return the shape of ``model``, on any device.

    Its groups are split as `ds_agsel.initialize` splits ``model_parameters``.

    Raises BlockError if the model can't be divided into blocks.
    """
    blocks = find_units(model, overrides, granularity)
    named = dict(model.named_parameters())
    user_groups = as_param_groups(model_parameters, model)
    split = split_param_groups(user_groups, {named[n]: block.index for block in blocks for n in block.parameter_names})
    linears = [m for layer in repeated_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
    return ModelShape(
        name=name,
        blocks=blocks,
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in split.groups),
        block_of_group=split.blocks,
        user_groups=tuple(
            tuple(p.numel() for p in group["params"] if p.requires_grad and p.numel()) for group in user_groups
        ),
        frozen=tuple(p.numel() for p in named.values() if not p.requires_grad),
        linears=tuple((linear.in_features, linear.out_features) for linear in linears),
    )


def read_shape(
    model: str, overrides: Mapping[str, Sequence[str]] | None = None, granularity: Granularity = "block"
) -> ModelShape:
    """Return the shape of ``model``, as `build_on_meta` finds it."""
    return shape_of(model, build_on_meta(model), overrides, granularity=granularity)
