"""Check a ds_config for ds_agsel: find every problem that `initialize` would stop at, without running."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ds_agsel.config import SECTION, SelectionConfig, find_section, fraction_hint, section_problems
from ds_agsel.ds_config import DsConfig, for_one_rank, without_zero, zero_section
from ds_agsel.entry.preparation import prepare
from ds_agsel.errors import ConfigError, ConfigErrors
from ds_agsel.policies.registry import policy_class
from ds_agsel.zero import compat
from ds_agsel.zero.support import optimizer_problem, unsupported

logger = logging.getLogger("ds_agsel")


def problems_of(ds_config: Mapping[str, Any], model: torch.nn.Module | None = None) -> list[str]:
    """Return one line per problem of ``ds_config``, with ``model`` if it is given (meta device will do).

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
    problems += _deepspeeds_problems(ds_config)
    problems += unsupported(settings, config, model)
    wrong_optimizer = optimizer_problem(settings) if settings.has_optimizer else None  # else an object is to come
    problems += [wrong_optimizer] if wrong_optimizer else []
    if model is None:
        problems += _policy_problems(config)
        if fraction_hint(config.select_percent) and not config.is_preset(
            "select_percent"
        ):  # with a model the lottery warns
            logger.warning(
                "%s.select_percent=%g.%s", SECTION, config.select_percent, fraction_hint(config.select_percent)
            )
    else:
        problems += _model_problems(config, model)
    return problems


def _deepspeeds_problems(ds_config: Mapping[str, Any]) -> list[str]:
    """Return the errors that DeepSpeed's own parser raises."""
    problems = compat.zero_section_problems(zero_section(ds_config))
    try:
        alone = for_one_rank({key: value for key, value in ds_config.items() if key != SECTION})
    except ConfigError as error:
        return [*problems, str(error)]
    if problems:  # already reported, setting by setting; the rest is parsed without them
        alone = without_zero(alone)
    return problems + compat.ds_config_problems(alone)


def _policy_problems(config: SelectionConfig) -> list[str]:
    try:
        policy_class(config.policy)
    except ConfigError as error:
        return [str(error)]
    return []


def _model_problems(config: SelectionConfig, model: torch.nn.Module) -> list[str]:
    """Return the problems that need the model's blocks: names of no block, a policy that can't choose."""
    try:
        # The length is known only where the data is.
        prepared = prepare(model, config, None, None, config.steps_per_epoch or 1)
    except ConfigErrors as error:
        return error.problems
    except ConfigError as error:
        return [str(error)]
    for target in prepared.targets:
        target.detach()  # a check leaves the model as it was
    return []
