"""The units that a selection chooses from: whole blocks, or with granularity "module" the matrices in the layers.

[Note: Units] With granularity "module" a repeated layer is divided. Each of its weights with two dimensions or more is
a *matrix*, a unit by itself: a Linear's or Conv1D's weight (fused projections are one matrix), each adapter matrix of
LoRA, a router's weight, and the weights of all experts where the model keeps them in one tensor of three dimensions, of
which ZeRO can't update a part. Sides of length 1 don't count. The rest of a layer are two units, its *norms* and its
*vectors*: biases, gains and what else has one dimension. They, and all that is outside the layers, are not in the
lottery. Units stand in the blocks' order; within a layer norms and vectors come first, as the first of them is used
before the first matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ds_agsel.blocks import Block, Kind, find_blocks, is_norm, numel, repeated_layers
from ds_agsel.config import Granularity


def find_units(
    model: nn.Module, overrides: Mapping[str, Sequence[str]] | None = None, granularity: Granularity = "block"
) -> tuple[Block, ...]:
    """Return the model's blocks as `blocks.find_blocks` does or, with granularity "module", divided by [Note: Units].

    A matrix has the name of its module ("model.layers.0.mlp.up_proj") or, if it isn't the module's "weight", its own.
    Norms and vectors have the layer's name and ".norms", ".vectors". Raises what `find_blocks` raises.
    """
    blocks = find_blocks(model, overrides)
    if granularity == "block":
        return blocks
    layers = {id(layer) for layer in repeated_layers(model)}
    paths = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in layers}
    units: list[Block] = []
    for block in blocks:
        parts = _parts(model, block) if block.name in paths else iter([replace(block, kind="rest")])
        units += [replace(part, index=len(units) + place) for place, part in enumerate(parts)]
    return tuple(units)


def _parts(model: nn.Module, layer: Block) -> Iterator[Block]:
    """Yield the units of ``layer``, with its index."""
    parameters = dict(model.named_parameters())
    divided: dict[tuple[Kind, str], list[str]] = {}
    norms, vectors = f"{layer.name}.norms", f"{layer.name}.vectors"
    for name in layer.parameter_names:
        path, _, own_name = name.rpartition(".")
        if is_norm(model.get_submodule(path)):
            found: tuple[Kind, str] = "norms", norms
        elif _is_matrix(parameters[name]) and not own_name.endswith("bias"):  # experts' biases are stacked, too
            found = "matrix", path if own_name == "weight" and path not in (layer.name, norms, vectors) else name
        else:
            found = "vectors", vectors
        divided.setdefault(found, []).append(name)
    order = sorted(divided, key=lambda unit: ("norms", "vectors", "matrix").index(unit[0]))
    for kind, name in order:
        names = tuple(divided[kind, name])
        size = sum(numel(parameters[parameter]) for parameter in names)
        yield Block(layer.index, name, names, size, kind, layer.name)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether two of its sides are longer than 1, also if ZeRO-3 (zero.Init) has left an empty tensor there."""
    return sum(side > 1 for side in getattr(parameter, "ds_shape", parameter.shape)) > 1
