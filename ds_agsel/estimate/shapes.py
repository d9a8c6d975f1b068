"""A model's shape: how many elements each parameter of each block has. Read from its config, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_agsel.blocks import Block, find_blocks, repeated_layers
from ds_agsel.config import did_you_mean
from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import as_param_groups, split_param_groups

Numels = tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """Elements of every parameter, in the order in which ZeRO flattens them.

    Attributes:
        blocks: in the model's order.
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

    def lora(self, rank: int) -> Numels:
        """The parameters of LoRA adapters on every linear layer: ``rank`` × inputs and outputs × ``rank`` each."""
        return tuple(numel for inputs, outputs in self.linears for numel in (rank * inputs, outputs * rank))


def shape_of(
    name: str, model: nn.Module, overrides: Mapping[str, Sequence[str]] | None = None, model_parameters: Any = None
) -> ModelShape:
    """The shape of ``model``, on any device, its groups split as `ds_agsel.initialize` splits ``model_parameters``.

    Raises BlockError where the model can't be divided into blocks.
    """
    blocks = find_blocks(model, overrides)
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


def read_shape(model: str, overrides: Mapping[str, Sequence[str]] | None = None) -> ModelShape:
    """The shape of ``model``, as `build_on_meta` finds it."""
    return shape_of(model, build_on_meta(model), overrides)


def build_on_meta(model: str) -> nn.Module:
    """``model`` without weights: a config.json, a folder that has one, a name in `known_models`, or a hub name.

    Raises ConfigError where there is no such model, or no causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = _read_config(model)
    try:
        with torch.device("meta"):
            built: nn.Module = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--model={model}: no causal language model can be built from its config: {_first_line(error)} "
            "Use the config.json of one."
        ) from error
    return built


def known_models() -> dict[str, dict[str, Any]]:
    """Configs that need no hub, by the model's name in lower case."""
    models: dict[str, dict[str, Any]] = json.loads(
        resources.files("ds_agsel.estimate").joinpath("known_models.json").read_text(encoding="utf-8")
    )
    return models


def _read_config(model: str) -> Any:
    from transformers import AutoConfig

    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _config_from(model, _read_json(model, path))
    if path.suffix == ".json" or path.name == "config.json" or model.startswith((".", "/", "~")):
        raise ConfigError(
            f"--model={model}: there is no file {path}. Give a model's config.json, the folder that has it, or a name."
        )
    known = known_models()
    if model.lower() in known:
        return _config_from(model, known[model.lower()])
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub client's own errors are many, and differ from release to release
        raise ConfigError(
            f"--model={model} is neither a file, nor known here, nor to be had from the hub: {_first_line(error)}"
            f"{did_you_mean(model, known)} Known without a hub: {', '.join(known)}."
        ) from error


def _read_json(model: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model={model}: {path} is not JSON ({error}). Give a model's config.json.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f'--model={model}: {path} has no "model_type". Give a config.json made by save_pretrained.')
    return config


def _config_from(model: str, fields: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(fields["model_type"], **rest)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--model={model}: transformers can't read its config (model_type={fields['model_type']!r}): "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
