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
        """Return the sizes of LoRA adapters on every linear layer: ``rank`` × inputs and outputs × ``rank`` each."""
        return tuple(numel for inputs, outputs in self.linears for numel in (rank * inputs, outputs * rank))


def shape_of(
    name: str, model: nn.Module, overrides: Mapping[str, Sequence[str]] | None = None, model_parameters: Any = None
) -> ModelShape:
    """Return the shape of ``model``, on any device.

    Its groups are split as `ds_agsel.initialize` splits ``model_parameters``.

    Raises BlockError if the model can't be divided into blocks.
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
    """Return the shape of ``model``, as `build_on_meta` finds it."""
    return shape_of(model, build_on_meta(model), overrides)


def build_on_meta(model: str) -> nn.Module:
    """Build ``model`` without weights from a config.json, a folder with one, a name in `known_models` or a hub name.

    It is the class of transformers that the config's ``architectures`` names, and where it names none the causal
    language model of its type. Raises ConfigError if there is no such model, or none can be built.
    """
    import transformers

    config = _read_config(model)
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    architecture: Any = getattr(transformers, str(named), None)
    is_model = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    try:
        with torch.device("meta"):
            if is_model:
                built: nn.Module = architecture._from_config(config)
            else:
                built = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # errors of config values that no layer, or no memory, can hold
        what = named if is_model else "causal language model"
        raise ConfigError(
            f"--model={model}: no {what} can be built from its config: {_reason(error)} Use the config.json of one."
        ) from error
    return built


def known_models() -> dict[str, dict[str, Any]]:
    """Return the configs that need no hub, by the model's name in lower case."""
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
            f"--model={model} is neither a file, nor known here, nor to be had from the hub: {_reason(error)}"
            f"{did_you_mean(model, known)} Known without a hub: {', '.join(known)}."
        ) from error


def _read_json(model: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--model={model}: {path} is not JSON ({error}). Give a model's config.json.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f'--model={model}: {path} has no "model_type". Give a config.json made by save_pretrained.')
    return config


def _config_from(model: str, fields: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(fields["model_type"], **_with_special_floats(rest))
    except Exception as error:  # transformers checks values in classes of its own, which differ from release to release
        raise ConfigError(
            f"--model={model}: transformers can't read its config (model_type={fields['model_type']!r}): "
            f"{_reason(error)}"
        ) from error


def _with_special_floats(value: Any) -> Any:
    """Return ``value`` with transformers' ``{"__float__": "Infinity"}``, which JSON can't express, as the number."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_special_floats(inner) for key, inner in value.items()}
    return [_with_special_floats(inner) for inner in value] if isinstance(value, list) else value


def _reason(error: BaseException) -> str:
    """Return the innermost error's reason in one line: if a line ends in a colon, the next one is the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__}."
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    said = f"{said} is unknown" if isinstance(error, KeyError) else said
    return said if said.endswith((".", ")")) else f"{said}."
