"""Refuses a DeepSpeed that has moved what this package relies on, before anything is trained."""

from __future__ import annotations

import deepspeed
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ds_agsel.errors import ConfigError
from ds_agsel.zero.compat.names import (
    GROUP_DICTS,
    GROUP_LISTS,
    METHODS,
    OFFLOAD_ATTRIBUTES,
    OFFLOAD_GROUP_LISTS,
    OTHER_ATTRIBUTES,
    STAGE3_ATTRIBUTES,
    STAGE3_METHODS,
    STAGE3_OFFLOAD_ATTRIBUTES,
    SUB_GROUP_DICTS,
    SUB_GROUP_LISTS,
)
from ds_agsel.zero.compat.versions import KNOWN_VERSIONS


def require_known_deepspeed(optimizer: ZeROOptimizer) -> None:
    """Raise ConfigError unless ``optimizer`` has all that this package relies on."""
    methods: tuple[str, ...]
    attributes: tuple[str, ...]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        stage, methods, attributes = "3", STAGE3_METHODS, SUB_GROUP_LISTS + SUB_GROUP_DICTS + STAGE3_ATTRIBUTES
        if getattr(optimizer, "offload_optimizer", False):
            attributes += STAGE3_OFFLOAD_ATTRIBUTES
    else:
        stage, methods, attributes = "1/2", METHODS, GROUP_LISTS + GROUP_DICTS + OTHER_ATTRIBUTES
        if getattr(optimizer, "cpu_offload", False):
            attributes += OFFLOAD_GROUP_LISTS + OFFLOAD_ATTRIBUTES
    missing = [name for name in methods if not hasattr(type(optimizer), name)]
    missing += [name for name in attributes if not hasattr(optimizer, name)]
    if missing:
        raise ConfigError(
            f"deepspeed=={deepspeed.__version__} has no {', '.join(missing)} in its ZeRO-{stage} optimizer, which "
            f"ds_agsel relies on. Known to work: {', '.join(KNOWN_VERSIONS)}; "
            f"install one of them: pip install 'deepspeed=={KNOWN_VERSIONS[-1]}'."
        )
