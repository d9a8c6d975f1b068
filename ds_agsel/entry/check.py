"""Whether a ds_config is sound for ds_agsel: every problem that `initialize` would stop at, found without running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_agsel.config import SECTION, SelectionConfig, find_section, section_problems
from ds_agsel.ds_config import DsConfig, zero_section
from ds_agsel.entry.preparation import prepare
from ds_agsel.errors import ConfigError, ConfigErrors
from ds_agsel.policies.registry import policy_class
from ds_agsel.zero import compat
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
    settings = DsConfig.of(ds_config)
    problems += compat.zero_section_problems(zero_section(ds_config))
    problems += unsupported(settings, config, model)
    wrong_optimizer = optimizer_problem(settings) if settings.has_optimizer else None  # else an object is to come
    problems += [wrong_optimizer] if wrong_optimizer else []
    problems += _policy_problems(config) if model is None else _model_problems(config, model)
    return problems


def _policy_problems(config: SelectionConfig) -> list[str]:
    try:
        policy_class(config.policy)
    except ConfigError as error:
        return [str(error)]
    return []


def _model_problems(config: SelectionConfig, model: torch.nn.Module) -> list[str]:
    """Return what is only seen with the model's blocks at hand: names that are none's, a policy that can't choose."""
    try:
        prepare(model, config, None, None, config.steps_per_epoch or 1)  # the length is known only where the data is
    except ConfigErrors as error:
        return error.problems
    except ConfigError as error:
        return [str(error)]
    return []
