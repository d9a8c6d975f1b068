"""Whether a ds_config is sound for ds_agsel: every problem that `initialize` would stop at, found without running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_agsel.blocks import block_names, find_blocks, resolve_names
from ds_agsel.config import SECTION, SelectionConfig, find_section, section_problems
from ds_agsel.errors import ConfigError
from ds_agsel.policies import PolicyContext, create, num_selected
from ds_agsel.policies.registry import policy_class
from ds_agsel.zero import compat, step_device
from ds_agsel.zero.support import optimizer_problem, unsupported


def problems_of(ds_config: Mapping[str, Any], model: torch.nn.Module | None = None) -> list[str]:
    """One line for each problem of ``ds_config``, for ``model`` where it is given (meta device will do).

    Values "auto", which HF Trainer and Accelerate fill in, are taken as sound.
    """
    problems: list[str] = []
    config = SelectionConfig()
    try:
        section = find_section(ds_config)
    except ConfigError as error:
        problems.append(str(error))
    else:
        if section is None:
            problems.append(
                f'ds_config has no section "{SECTION}", so that DeepSpeed runs as it is. '
                f'Add "{SECTION}": {{"select_percent": 20}} at top level.'
            )
        else:
            wrong = section_problems(section)
            problems += wrong
            config = config if wrong else SelectionConfig(**section)
    filled = _without_auto(ds_config)
    problems += compat.zero_section_problems(_section(filled, "zero_optimization"))
    problems += unsupported(filled, config, model)
    problems += _step_device_problems(filled, config)
    wrong_optimizer = optimizer_problem(filled) if filled.get("optimizer") else None  # else an object is to come
    problems += [wrong_optimizer] if wrong_optimizer else []
    problems += _policy_problems(config) if model is None else _model_problems(config, model)
    return problems


def _step_device_problems(ds_config: Mapping[str, Any], config: SelectionConfig) -> list[str]:
    """Contradictions that hold on every machine: it is taken to have an accelerator, with room."""
    zero = _section(ds_config, "zero_optimization")
    anywhere = step_device.Situation(
        offloads=_section(zero, "offload_optimizer").get("device") == "cpu",
        can_offload=True,
        has_own_memory=True,
        needed_bytes=0,
        available_bytes=0,
    )
    try:
        step_device.decide(config.step_device, anywhere)
    except ConfigError as error:
        return [str(error)]
    return []


def _policy_problems(config: SelectionConfig) -> list[str]:
    try:
        policy_class(config.policy)
    except ConfigError as error:
        return [str(error)]
    return []


def _model_problems(config: SelectionConfig, model: torch.nn.Module) -> list[str]:
    """What is only seen with the model's blocks at hand: names that are none's, a policy that can't choose."""
    problems: list[str] = []
    try:
        blocks = find_blocks(model, config.blocks)
    except ConfigError as error:
        return [*_policy_problems(config), str(error)]
    outside: set[int] = set()
    for setting in ("always_select", "never_select"):
        try:
            outside |= set(resolve_names(blocks, getattr(config, setting), setting))
        except ConfigError as error:
            problems.append(str(error))
    drawn = tuple(block for block in blocks if block.index not in outside)
    try:
        context = PolicyContext(
            config=config,
            num_blocks=len(drawn),
            num_selected=num_selected(config.select_percent, len(drawn)),
            block_names=block_names(drawn),
            steps_per_epoch=config.steps_per_epoch or 1,  # known only where the data is
        )
        create(context)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
