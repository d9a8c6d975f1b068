"""DeepSpeed's own reading of a ds_config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError


def zero_section_problems(section: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed itself will refuse in a ``zero_optimization`` section that has no values "auto"."""
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        return [
            f"zero_optimization.{'.'.join(map(str, found['loc']))}={found['input']!r} is refused by DeepSpeed: "
            f"{found['msg']}. See the table of ZeRO settings in its documentation."
            for found in error.errors(include_url=False)
        ]
    return []
