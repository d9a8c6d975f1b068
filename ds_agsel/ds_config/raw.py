"""A ds_config as the user wrote it: sections, values "auto", and one spelling for each setting."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

AUTO = "auto"
ZERO = "zero_optimization"
TIMER = "timers.throughput"
# Settings of ZeRO that DeepSpeed also takes under the name without "stage3_" (zero/config.py, Field(alias=...)).
STAGE3_ALIASES = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip
# Deprecated flags, each with the section that DeepSpeed replaces it by (device "cpu") if it is true.
DEPRECATED_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def without_autos(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without the values "auto", at any depth."""
    return {
        key: without_autos(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if not is_auto(value)
    }


def zero_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ZeRO section of ``raw`` as DeepSpeed's `DeepSpeedZeroConfig` takes it, without values "auto"."""
    return without_autos(raw_zero_section(raw))


def settings_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` in one spelling: no "auto", no enums, today's names."""
    settings = _without_enums(without_autos(raw))
    if settings.get("bf16") is None and settings.get("bfloat16") is not None:
        settings["bf16"] = settings["bfloat16"]
    settings.pop("bfloat16", None)
    zero = dict(raw_zero_section(settings))
    for name in STAGE3_ALIASES:
        if name in zero:
            zero[f"stage3_{name}"] = zero.pop(name)
    for name, section in DEPRECATED_OFFLOADS.items():
        if zero.pop(name, False) and not zero.get(section):
            zero[section] = {"device": "cpu"}
    if zero:
        settings[ZERO] = zero
    return settings


def raw_zero_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ZeRO section of ``raw`` as it is written; empty if there is none."""
    # A bool is the form used before the section existed (zero/config.py, read_zero_config_deprecated).
    if isinstance(raw.get(ZERO), bool):
        return {"stage": int(raw[ZERO])}
    return subsection(raw, ZERO)


def subsection(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the mapping at ``name``; an empty one where there is none."""
    section = mapping.get(name)
    return section if isinstance(section, Mapping) else {}


def at(settings: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value at a dotted path; ``default`` where it is missing or null."""
    *sections, name = path.split(".")
    for section in sections:
        settings = subsection(settings, section)
    value = settings.get(name)
    return default if value is None else value


def is_auto(value: Any) -> bool:
    """Return whether ``value`` is the word "auto"."""
    return isinstance(value, str) and value == AUTO


def _without_enums(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_enums(inner) for key, inner in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def autos_in(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of each "auto" in ``value``, at any depth, below ``path``."""
    if is_auto(value):
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from autos_in(inner, f"{path}.{name}" if path else str(name))
