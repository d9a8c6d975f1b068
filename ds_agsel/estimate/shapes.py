"""A model's shape: how many elements each parameter of each block has. Read from its config, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ds_agsel.blocks import Block, repeated_layers
from ds_agsel.config import Granularity
from ds_agsel.estimate.models import build_on_meta
from ds_agsel.estimate.sparse_shape import Matrix, SparseShape
from ds_agsel.param_groups import ParamGroup, as_param_groups, split_param_groups, with_partners
from ds_agsel.sparse.targets import Target, find_targets
from ds_agsel.sparse_grad_section import SparseGradConfig
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
        sparse: the matrices of `sparse_grad`. Their carriers are in ``groups``, they themselves in ``frozen``.
        dense: with ``sparse`` the same model without it: what other methods train.
    """

    name: str
    blocks: tuple[Block, ...]
    groups: tuple[Numels, ...]
    block_of_group: tuple[int, ...]
    user_groups: tuple[Numels, ...]
    frozen: Numels = ()
    linears: tuple[tuple[int, int], ...] = ()
    sparse: SparseShape | None = None
    dense: ModelShape | None = None

    @property
    def numel(self) -> int:
        """All of the model's elements, frozen ones too; carriers are not the model's."""
        if self.dense is not None:
            return self.dense.numel
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
    sparse_grad: SparseGradConfig | None = None,
) -> ModelShape:
    """Return the shape of ``model``, on any device.

    Its groups are split as `ds_agsel.initialize` splits ``model_parameters``.

    Raises BlockError if the model can't be divided into blocks, ConfigError for matrices that `sparse_grad` can't have.
    """
    user_groups = as_param_groups(model_parameters, model)
    dense = _shape(name, model, overrides, user_groups, granularity, ())
    if sparse_grad is None:
        return dense
    targets = find_targets(model, sparse_grad)
    with ExitStack() as attached:
        for target in targets:
            target.attach()
            attached.callback(target.detach)
        shape = _shape(name, model, overrides, user_groups, granularity, targets)
        block_of = {member: block.index for block in shape.blocks for member in block.parameter_names}
        matrices = tuple(_matrix(target, block_of[target.carrier_name], sparse_grad) for target in targets)
    sparse = SparseShape(matrices, sparse_grad.rotation, sparse_grad.refresh_steps is not None)
    return replace(shape, sparse=sparse, dense=dense)


def _shape(
    name: str,
    model: nn.Module,
    overrides: Mapping[str, Sequence[str]] | None,
    user_groups: Sequence[ParamGroup],
    granularity: Granularity,
    targets: Sequence[Target],
) -> ModelShape:
    """Return the shape of ``model`` with ``targets`` attached, apart from what is said of them."""
    blocks = find_units(model, overrides, granularity)
    named = dict(model.named_parameters())
    block_of = {named[n]: block.index for block in blocks for n in block.parameter_names}
    carrier_of = {target.weight: target.carrier for target in targets}
    split = split_param_groups(with_partners(user_groups, carrier_of), block_of, apart=frozenset(carrier_of.values()))
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


def _matrix(target: Target, block: int, section: SparseGradConfig) -> Matrix:
    basis = target.kind if section.basis == "kind" else target.name
    return Matrix(block, target.num_lines, target.num_directions, target.entries, basis)


def read_shape(
    model: str,
    overrides: Mapping[str, Sequence[str]] | None = None,
    granularity: Granularity = "block",
    sparse_grad: SparseGradConfig | None = None,
) -> ModelShape:
    """Return the shape of ``model``, as `build_on_meta` finds it."""
    return shape_of(model, build_on_meta(model), overrides, granularity=granularity, sparse_grad=sparse_grad)
