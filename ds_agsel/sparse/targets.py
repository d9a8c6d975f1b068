"""Find the matrices whose entries are trained, and give each its carrier: one parameter of K values.

[Note: Carriers] A target's own weight is frozen, so that it is in no block, no param group and no state of ZeRO's.
Beside it stands the carrier, in the same module and so in the layer's block: a parameter of K values, at first 0, which
ZeRO reduces, clips and steps as any other. Files of weights never hold it: a module's state_dict leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_agsel.blocks import repeated_layers
from ds_agsel.config import SECTION, quoted
from ds_agsel.errors import ConfigError
from ds_agsel.sparse.basis import Energy, Rotation, Support
from ds_agsel.sparse.linear import EntriesGradient
from ds_agsel.sparse.staircase import num_entries
from ds_agsel.sparse_grad_section import SPARSE_GRAD, SparseGradConfig

CARRIER = "sparse_grad_values"
_SETTING = f"{SECTION}.{SPARSE_GRAD}.modules"
_TARGET = "_ds_agsel_target"  # where a module keeps its target
_INPUTS_FIRST = ("Conv1D",)  # transformers' class for GPT-2: its weight is (D_in, D_out)


@dataclass
class Target:
    """One matrix of which K entries are trained.

    Attributes:
        name: the weight's, as in ``model.named_parameters()``.
        shape: of the weight, as it is stored.
        lines_are_rows: whether the longer side is the weight's first dimension.
        lines_are_outputs: whether the longer side is the layer's output.
        kind: the name without the numbers of layers: matrices of a kind share a basis where the section says so.
        support: the trained entries; None until they are chosen.
        energy: gathers the gradients of this window's backward; None: it does not.
        tap: given the layer's input and output, returns an output whose backward gives the carrier its gradient; None,
            or where it returns None: the carrier learns from all rows.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    entries: int
    lines_are_rows: bool
    lines_are_outputs: bool
    support: Support | None = None
    energy: Energy | None = None
    tap: Callable[[Tensor, Tensor], Tensor | None] | None = field(default=None, repr=False)
    _handles: list[Any] = field(default_factory=list, repr=False)

    @property
    def weight(self) -> nn.Parameter:
        """The frozen matrix."""
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def carrier(self) -> nn.Parameter:
        """The trained values, (K,)."""
        carrier: nn.Parameter = getattr(self.module, CARRIER)
        return carrier

    @property
    def carrier_name(self) -> str:
        """The carrier's name in ``model.named_parameters()``."""
        return self.name.removesuffix("weight") + CARRIER

    @property
    def kind(self) -> str:
        """The weight's name with the numbers of layers left out."""
        return re.sub(r"\d+", "*", self.name)

    @property
    def num_lines(self) -> int:
        """L, the longer side."""
        return max(self.shape)

    @property
    def num_directions(self) -> int:
        """d, the shorter side: that of the hidden size."""
        return min(self.shape)

    def new_energy(self, rotation: Rotation, device: torch.device) -> Energy:
        """Return the energy of no gradient of this matrix."""
        return Energy.zero(rotation, self.num_lines, self.num_directions, device)

    def attach(self) -> None:
        """Freeze the weight, add the carrier, and give it its gradient from now on."""
        weight, module = self.weight, self.module
        weight.requires_grad_(False)
        carrier = nn.Parameter(torch.zeros(self.entries, dtype=weight.dtype, device=weight.device))
        module.register_parameter(CARRIER, carrier)
        module.__dict__[_TARGET] = self
        self._handles = [
            module.register_forward_hook(self._after_forward, with_kwargs=True),
            module.register_state_dict_post_hook(_leave_out),
            module.register_load_state_dict_pre_hook(_put_in),
        ]

    def detach(self) -> None:
        """Undo `attach`: what the values have added to the weight stays."""
        for handle in self._handles:
            handle.remove()
        del self.module._parameters[CARRIER], self.module.__dict__[_TARGET]
        self.weight.requires_grad_(True)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        carrier = self.carrier
        if not (torch.is_grad_enabled() and carrier.requires_grad and isinstance(output, Tensor)):
            return output
        layer_input = args[0] if args else next(iter(kwargs.values()))
        tapped = None if self.tap is None else self.tap(layer_input, output)
        return EntriesGradient.apply(output, layer_input.detach(), carrier, self) if tapped is None else tapped


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state_dict.pop(prefix + CARRIER, None)


def _put_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.setdefault(prefix + CARRIER, module._parameters[CARRIER])


def find_targets(model: nn.Module, section: SparseGradConfig) -> tuple[Target, ...]:
    """Return the targets of ``model``, not attached, in the model's order.

    Without ``modules``: the Linears (and Conv1Ds) of repeated layers with the longest side of their layer: an MLP's.
    Raises ConfigError where there is none, and for a match that is frozen, quantized, tied, or no matrix of a Linear.
    """
    linears = _linears(model)
    names = _matching(model, linears, section.modules) if section.modules is not None else _of_mlps(model, linears)
    if not names:
        raise ConfigError(
            f"{_SETTING} is not set, and {type(model).__name__} has no repeated layers with Linears of two different "
            "sides. Name the weights by regular expressions."
        )
    owner_of: dict[int, str] = {}
    for name, module in linears.items():
        other = owner_of.setdefault(id(module.weight), name)
        if other != name and {name, other} & set(names):
            raise ConfigError(f"{_SETTING}: {quoted([other, name])} are one tied weight. Match other weights.")
    return tuple(_target(name, linears[name], section) for name in names)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a matrix and an input of its size, by their weight's name."""
    return {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ in _INPUTS_FIRST
    }


def _of_mlps(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    found: list[str] = []
    name_of = {id(module): name for name, module in linears.items()}
    for layer in repeated_layers(model):
        members = {name_of[id(m)]: _shape(m) for m in layer.modules() if id(m) in name_of}
        longest = max((max(shape) for shape in members.values()), default=0)
        found += [name for name, shape in members.items() if max(shape) == longest > min(shape)]
    return found


def _matching(model: nn.Module, linears: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    every = dict(model.named_parameters())
    found: list[str] = []
    for pattern in patterns:
        matched = [name for name in every if re.fullmatch(pattern, name)]
        if not matched:
            raise ConfigError(f"{_SETTING} has {pattern!r}, which matches no parameter. Match a whole name.")
        for name in matched:
            if name not in linears:
                raise ConfigError(
                    f"{_SETTING} has {pattern!r}, which matches {name}: not the weight of a Linear. Match less."
                )
        found += matched
    return sorted(set(found), key=list(every).index)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    rows, columns = getattr(weight, "ds_shape", weight.shape)
    return int(rows), int(columns)


def _target(name: str, module: nn.Module, section: SparseGradConfig) -> Target:
    weight: Any = module.weight
    if not weight.dtype.is_floating_point or type(weight).__name__ not in ("Parameter",):
        raise ConfigError(
            f"{_SETTING}: {name} is quantized ({type(weight).__name__}, {weight.dtype}). Match other weights."
        )
    if not weight.requires_grad:
        raise ConfigError(
            f"{_SETTING}: {name} is frozen before training, and its entries can't be trained. Thaw it, or match other "
            "weights."
        )
    if ".lora_" in name or ".base_layer." in name:
        raise ConfigError(f"{_SETTING}: {name} belongs to a LoRA layer, which is small already. Match other weights.")
    shape = _shape(module)
    entries = num_entries(section.entries_percent, shape[0] * shape[1])
    inputs_first = type(module).__name__ in _INPUTS_FIRST
    lines_are_rows = shape[0] >= shape[1]
    return Target(name, module, shape, entries, lines_are_rows, lines_are_rows != inputs_first)


def is_carrier(name: str) -> bool:
    """Return whether ``name`` of ``model.named_parameters()`` is a carrier's."""
    return name.rpartition(".")[2] == CARRIER


def weight_of(carrier: str) -> str:
    """Return the name of the matrix whose entries the carrier called ``carrier`` holds."""
    return carrier.removesuffix(CARRIER) + "weight"


def target_of(module: nn.Module) -> Target | None:
    """Return the target that is attached to ``module``, if one is."""
    target: Target | None = module.__dict__.get(_TARGET)
    return target


def detach_all(model: nn.Module) -> None:
    """Detach what an earlier engine attached to ``model``; its matrices keep what they have learned."""
    for module in model.modules():
        target = target_of(module)
        if target is not None:
            target.detach()
