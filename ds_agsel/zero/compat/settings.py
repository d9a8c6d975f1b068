"""DeepSpeed's own reading of a ds_config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError


def ds_config_problems(ds_config: Mapping[str, Any]) -> list[str]:
    """Return the errors of DeepSpeed's own parser on ``ds_config``, which has no values "auto" and fits one rank.

    No process group is needed: without one the parser takes one rank (runtime/config.py, DeepSpeedConfig.__init__). It
    stops at its first complaint; a wrong section of a pydantic model gives a line for each of its settings.
    """
    try:
        parsed = DeepSpeedConfig(dict(ds_config))
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, found['loc']))}={found['input']!r} is refused by DeepSpeed ({error.title}): "
            f"{found['msg']}. See this section in its documentation."
            for found in error.errors(include_url=False)
        ]
    except (
        Exception
    ) as error:  # AssertionError, ValueError, DeepSpeedConfigError, or any error that a value's type causes
        return [f"DeepSpeed refuses this ds_config: {str(error) or type(error).__name__}"]
    return list(_engine_problems(parsed))


def _engine_problems(parsed: DeepSpeedConfig) -> Iterator[str]:
    """Yield the problems that the parser accepts and the engine stops at."""
    name = parsed.scheduler_name
    if name is not None and not hasattr(lr_schedules, name) and not hasattr(torch.optim.lr_scheduler, name):
        yield (
            f"scheduler.type={name!r} is refused by DeepSpeed, which does not know it. Use one of "
            f"{', '.join(lr_schedules.VALID_LR_SCHEDULES)}, or a class of torch.optim.lr_scheduler."
        )
    if parsed.prescale_gradients and parsed.zero_config.reduce_scatter and parsed.zero_enabled:
        yield (
            "prescale_gradients=true with zero_optimization.reduce_scatter=true is refused by DeepSpeed. Set one of "
            "them to false."
        )


def zero_section_problems(section: Mapping[str, Any]) -> list[str]:
    """Return DeepSpeed's own errors for a ``zero_optimization`` section that has no values "auto"."""
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        return [
            f"zero_optimization.{'.'.join(map(str, found['loc']))}={found['input']!r} is refused by DeepSpeed: "
            f"{found['msg']}. See the table of ZeRO settings in its documentation."
            for found in error.errors(include_url=False)
        ]
    return []
