"""The ds_config, read in one place: `DsConfig` says what DeepSpeed 0.19 will make of it.

This is the only module that knows DeepSpeed's names of settings. It imports no deepspeed: the defaults and spellings
below are those of deepspeed/runtime/config.py, runtime/precision_config.py, runtime/zero/config.py and
runtime/zero/offload_config.py, and a test compares them with DeepSpeed's own parser. Functions that change a ds_config
return a new mapping and leave the caller's as it is.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ds_agsel.errors import ConfigError

AUTO = "auto"
DEVICES = ("none", "cpu", "nvme")

_ZERO = "zero_optimization"
# Settings of ZeRO that DeepSpeed also takes under the name without "stage3_" (zero/config.py, Field(alias=...)).
_STAGE3_ALIASES = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip
# Deprecated flags, each with the section that DeepSpeed replaces it by (device "cpu") if it is true.
_DEPRECATED_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_ADAPTERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (int, float, bool)}  # as pydantic does
# Params of schedulers, DeepSpeed's (lr_schedules.py) and torch's, that may be lists with a value per param group.
_SCHEDULER_LISTS = frozenset(
    {
        "warmup_min_lr", "warmup_max_lr", "lr_range_test_min_lr", "cycle_min_lr", "cycle_max_lr", "cycle_min_mom",
        "cycle_max_mom", "max_lr", "base_lr", "min_lr", "max_momentum", "base_momentum",
    }
)  # fmt: skip
_FP16_NAMES = ("float16", "fp16", "half", "torch.float16")


@dataclass(frozen=True)
class Offload:
    """An ``offload_optimizer`` or ``offload_param`` section. ``device`` is one of `DEVICES`, or what was written."""

    device: str = "none"
    nvme_path: str | None = None
    buffer_count: int = 4

    @property
    def is_on(self) -> bool:
        """Whether something leaves the accelerator."""
        return self.device != "none"


@dataclass(frozen=True)
class DsConfig:
    """What a ds_config says, with DeepSpeed's defaults where it says nothing or "auto". Make it with `DsConfig.of`.

    Values are converted as DeepSpeed converts them ("2" and 2.0 are 2). One that can't be converted is taken as the
    default here and named by `require_readable`; DeepSpeed's own parser refuses it too.

    Attributes:
        stage: the ZeRO stage; 0 without ZeRO.
        precision: "fp32", "bf16" or "fp16": the dtype of the model weights.
        autocast_dtype: that of ``torch_autocast``, where it is enabled.
        accumulation_dtype: ``data_types.grad_accum_dtype``; None for DeepSpeed's default.
        train_batch_size, micro_batch_size, accumulation_steps: None if not set.
        optimizer_type, scheduler_type: None without that section.
        reduce_bucket_numel, sub_group_numel, persistence_threshold_numel, max_live_numel, prefetch_bucket_numel: sizes
            in elements; the last is None if not set.
        autos: dotted paths of all values "auto", as the user spelt them.
    """

    stage: int
    offload_optimizer: Offload
    offload_param: Offload
    precision: str
    autocast_dtype: str | None
    accumulation_dtype: str | None
    train_batch_size: int | None
    micro_batch_size: int | None
    accumulation_steps: int | None
    gradient_clipping: float
    optimizer_type: str | None
    optimizer_params: Mapping[str, Any]
    scheduler_type: str | None
    scheduler_params: Mapping[str, Any]
    reduce_bucket_numel: int
    sub_group_numel: int
    persistence_threshold_numel: int
    max_live_numel: int
    prefetch_bucket_numel: int | None
    overlap_comm: bool
    contiguous_gradients: bool
    round_robin_gradients: bool
    parameter_alignment: bool
    autos: tuple[str, ...]
    _unreadable: Mapping[str, str] = field(repr=False)
    _settings: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> DsConfig:
        """Return the settings of the mapping ``raw``, which is not modified."""
        settings = _settings(raw)
        read = _Reader(settings)
        stage = read.whole(f"{_ZERO}.stage", 0)
        optimizer, scheduler = _section(settings, "optimizer"), _section(settings, "scheduler")
        return cls(
            stage=stage,
            offload_optimizer=read.offload("offload_optimizer", buffer_count=4),
            offload_param=read.offload("offload_param", buffer_count=5),
            precision=read.precision(),
            autocast_dtype=read.autocast_dtype(),
            accumulation_dtype=read.value("data_types.grad_accum_dtype"),
            train_batch_size=read.batch("train_batch_size"),
            micro_batch_size=read.batch("train_micro_batch_size_per_gpu"),
            accumulation_steps=read.batch("gradient_accumulation_steps"),
            gradient_clipping=read.number("gradient_clipping", 0.0),
            optimizer_type=_text(optimizer.get("type")),
            optimizer_params=MappingProxyType(dict(_section(optimizer, "params"))),
            scheduler_type=_text(scheduler.get("type")),
            scheduler_params=MappingProxyType(dict(_section(scheduler, "params"))),
            reduce_bucket_numel=read.whole(f"{_ZERO}.reduce_bucket_size", 500_000_000),
            sub_group_numel=read.whole(f"{_ZERO}.sub_group_size", 1_000_000_000),
            persistence_threshold_numel=read.whole(f"{_ZERO}.stage3_param_persistence_threshold", 100_000),
            max_live_numel=read.whole(f"{_ZERO}.stage3_max_live_parameters", 1_000_000_000),
            prefetch_bucket_numel=read.whole(f"{_ZERO}.stage3_prefetch_bucket_size", None),
            overlap_comm=read.flag(f"{_ZERO}.overlap_comm", stage == 3),
            contiguous_gradients=read.flag(f"{_ZERO}.contiguous_gradients", True),
            round_robin_gradients=read.flag(f"{_ZERO}.round_robin_gradients", False),
            parameter_alignment=read.flag(f"{_ZERO}.parameter_alignment", False),
            autos=tuple(_autos(raw)),
            _unreadable=MappingProxyType(read.unreadable),
            _settings=settings,
        )

    @property
    def has_optimizer(self) -> bool:
        """Whether the ds_config has an ``optimizer`` section."""
        return bool(self._settings.get("optimizer"))

    @property
    def is_half(self) -> bool:
        """Whether model weights are bf16 or fp16."""
        return self.precision != "fp32"

    @property
    def bf16_is_auto(self) -> bool:
        """Whether bf16 is "auto", to be filled in by the integration (Trainer, Accelerate)."""
        return any(path in self.autos for path in ("bf16.enabled", "bfloat16.enabled"))

    @property
    def autocasts_to_fp16(self) -> bool:
        """Whether forward computes in fp16 by ``torch_autocast``."""
        return self.autocast_dtype in _FP16_NAMES

    @property
    def arithmetic(self) -> str:
        """The dtype that forward computes in: "fp32", "bf16", "fp16", or "autocast " and a dtype."""
        if self.is_half or self.autocast_dtype is None:
            return self.precision
        return f"autocast {self.autocast_dtype}"

    def value(self, path: str, default: Any = None) -> Any:
        """Return the setting at a dotted path in its usual spelling; ``default`` where it is not set or "auto"."""
        return _at(self._settings, path, default)

    def require_readable(self, *paths: str) -> None:
        """Raise ConfigError for the first of ``paths`` whose value is of a wrong kind; without paths, for any."""
        for path in paths or self._unreadable:
            if path in self._unreadable:
                raise ConfigError(self._unreadable[path])


class _Reader:
    """Converts settings, and notes those that it can't convert by their path."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.unreadable: dict[str, str] = {}

    def value(self, path: str) -> Any:
        return _at(self._settings, path, None)

    def _converted(self, path: str, default: Any, kind: type, fits: str, least: float | None = None) -> Any:
        value = self.value(path)
        if value is None:
            return default
        found: Any
        try:
            found = _ADAPTERS[kind].validate_python(value)
        except ValidationError:
            found = None
        if found is None or (least is not None and found < least):
            self.unreadable[path] = f"{path}={value!r} is not {fits}."
            return default
        return found

    def whole(self, path: str, default: int | None) -> Any:
        return self._converted(path, default, int, "a number of 0 or more", 0)

    def number(self, path: str, default: float) -> float:
        return float(self._converted(path, default, float, "a number of 0 or more", 0))

    def flag(self, path: str, default: bool) -> bool:
        return bool(self._converted(path, default, bool, "true or false"))

    def batch(self, path: str) -> int | None:
        remedy = "a whole number from 1 on. Correct it, or leave it out"
        found: int | None = self._converted(path, None, int, remedy, 1)
        return found

    def offload(self, name: str, buffer_count: int) -> Offload:
        section = _section(_section(self._settings, _ZERO), name)
        device, folder = section.get("device", "none"), section.get("nvme_path")
        if device not in DEVICES:
            self.unreadable[f"{_ZERO}.{name}.device"] = unknown_device(name, device)
        count = self.whole(f"{_ZERO}.{name}.buffer_count", buffer_count)
        return Offload(str(device), str(folder) if folder else None, count)

    def precision(self) -> str:
        for name in ("bf16", "fp16"):
            if self.flag(f"{name}.enabled", False):
                return name
        return "fp32"

    def autocast_dtype(self) -> str | None:
        if not self.flag("torch_autocast.enabled", False):
            return None
        return str(self.value("torch_autocast.dtype") or "bfloat16")


def unknown_device(name: str, device: Any) -> str:
    """Return the message for an unknown ``device`` in the offload section ``name``."""
    return f"{_ZERO}.{name}.device={device!r} is unknown. Use none, cpu or nvme."


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Return the ds_config in the file ``path``, read as DeepSpeed reads it.

    That is JSON, with comments and trailing commas allowed (Hjson). Raises ConfigError if the file can't be read, holds
    no object, or has a key twice.
    """
    import hjson  # type: ignore[import-untyped]  # what DeepSpeed reads its config with

    try:
        config = hjson.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except OSError as error:
        raise ConfigError(f"{path} can't be read as a ds_config: {error.strerror}. Give a JSON file.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as a ds_config: {error}. Give a JSON file.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {str(config)[:40]!r} and not an object. Give a ds_config in JSON.")
    return config


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [f'"{key}"' for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {', '.join(twice)} stands in it twice")
    return dict(pairs)


# ---------------------------------------------------------------- edits: each returns a new mapping


def without_autos(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without the values "auto", at any depth."""
    return {
        key: without_autos(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if not _is_auto(value)
    }


def with_zero(raw: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Return ``raw`` with ``settings`` in its ZeRO section."""
    return {**raw, _ZERO: {**_zero_section(raw), **settings}}


def without_zero(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without its ZeRO section."""
    return {key: value for key, value in raw.items() if key != _ZERO}


def with_offload_to_cpu(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with the optimizer on the host; states that are already offloaded are not moved."""
    if DsConfig.of(raw).offload_optimizer.is_on:
        return dict(raw)
    zero = _zero_section(raw)
    offload = {"pin_memory": True, **without_autos(_section(zero, "offload_optimizer")), "device": "cpu"}
    zero = {key: value for key, value in zero.items() if _DEPRECATED_OFFLOADS.get(key) != "offload_optimizer"}
    return {**raw, _ZERO: {**zero, "offload_optimizer": offload}}


def without_pipelined_swapping(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with DeepSpeed's own overlap of NVMe reads and writes off, where states are on NVMe."""
    if DsConfig.of(raw).offload_optimizer.device != "nvme":
        return dict(raw)
    offload = _section(_zero_section(raw), "offload_optimizer")
    return with_zero(raw, offload_optimizer={**offload, "pipeline_read": False, "pipeline_write": False})


def with_torch_adam(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with ``torch_adam`` set in its optimizer section, if it has one."""
    return _with_params(raw, "optimizer", torch_adam=True) if raw.get("optimizer") else dict(raw)


def without_optimizer(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without its optimizer section."""
    return {key: value for key, value in raw.items() if key != "optimizer"}


def with_learning_rate(raw: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """Return ``raw`` with the optimizer's ``lr``, where it has an optimizer section."""
    return _with_params(raw, "optimizer", lr=lr) if raw.get("optimizer") else dict(raw)


def with_scheduler_params(raw: Mapping[str, Any], **params: Any) -> dict[str, Any]:
    """Return ``raw`` with ``params`` of the scheduler, where it has a scheduler section."""
    return _with_params(raw, "scheduler", **params) if raw.get("scheduler") else dict(raw)


def with_scheduler_for_groups(raw: Mapping[str, Any], num_groups: int, parents: Sequence[int]) -> dict[str, Any]:
    """Return ``raw`` for an optimizer whose ``num_groups`` groups were split: the i-th new one is of ``parents[i]``.

    A list in the scheduler's params with one value for each of the old groups gets one for each of the new ones.
    Raises ConfigError for a list of another length.
    """
    repeated = {}
    for name, value in DsConfig.of(raw).scheduler_params.items():
        if name not in _SCHEDULER_LISTS or not isinstance(value, list | tuple):
            continue
        if len(value) != num_groups:
            raise ConfigError(
                f"scheduler.params.{name}={list(value)} has {len(value)} values, and the optimizer has {num_groups} "
                "param groups. Give one value for each group, or a single number."
            )
        repeated[name] = [value[parent] for parent in parents]
    return with_scheduler_params(raw, **repeated) if repeated else dict(raw)


def for_one_rank(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without values "auto" and with batch sizes that fit a single rank, for DeepSpeed's own parser.

    Raises ConfigError if no number of ranks makes train_batch_size the product of the other two.
    """
    read = DsConfig.of(raw)
    read.require_readable("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = read.train_batch_size, read.micro_batch_size, read.accumulation_steps
    if total is not None and total % ((micro or 1) * (steps or 1)):
        raise ConfigError(
            f"train_batch_size={total} is no multiple of train_micro_batch_size_per_gpu={micro or 1} × "
            f"gradient_accumulation_steps={steps or 1}, so that no number of ranks fits. Change one, or leave "
            "train_batch_size out."
        )
    return with_batch(without_autos(raw), micro or 1, steps or 1)


def with_bf16(raw: Mapping[str, Any], enabled: bool) -> dict[str, Any]:
    """Return ``raw`` with its value "auto" for bf16, under either name, filled in."""
    name = "bf16" if raw.get("bf16") is not None else "bfloat16"
    return {**raw, name: {**_section(raw, name), "enabled": enabled}}


def with_batch(raw: Mapping[str, Any], micro_batch_size: int, accumulation_steps: int) -> dict[str, Any]:
    """Return ``raw`` with these rows per micro-batch and accumulation steps; DeepSpeed multiplies them itself."""
    kept = {key: value for key, value in raw.items() if key != "train_batch_size"}
    kept["train_micro_batch_size_per_gpu"] = micro_batch_size
    return {**kept, "gradient_accumulation_steps": accumulation_steps}


def _with_params(raw: Mapping[str, Any], name: str, **params: Any) -> dict[str, Any]:
    section = _section(raw, name)
    return {**raw, name: {**section, "params": {**_section(section, "params"), **params}}}


# ---------------------------------------------------------------- the raw mapping


def zero_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ZeRO section of ``raw`` as DeepSpeed's `DeepSpeedZeroConfig` takes it, without values "auto"."""
    return without_autos(_zero_section(raw))


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` in one spelling: no "auto", no enums, today's names."""
    settings = _without_enums(without_autos(raw))
    if settings.get("bf16") is None and settings.get("bfloat16") is not None:
        settings["bf16"] = settings["bfloat16"]
    settings.pop("bfloat16", None)
    zero = dict(_zero_section(settings))
    for name in _STAGE3_ALIASES:
        if name in zero:
            zero[f"stage3_{name}"] = zero.pop(name)
    for name, section in _DEPRECATED_OFFLOADS.items():
        if zero.pop(name, False) and not zero.get(section):
            zero[section] = {"device": "cpu"}
    if zero:
        settings[_ZERO] = zero
    return settings


def _zero_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(
        raw.get(_ZERO), bool
    ):  # the form used before the section existed (zero/config.py, read_zero_config_deprecated)
        return {"stage": int(raw[_ZERO])}
    return _section(raw, _ZERO)


def _section(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = mapping.get(name)
    return section if isinstance(section, Mapping) else {}


def _at(settings: Mapping[str, Any], path: str, default: Any) -> Any:
    *sections, name = path.split(".")
    for section in sections:
        settings = _section(settings, section)
    value = settings.get(name)
    return default if value is None else value


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _without_enums(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_enums(inner) for key, inner in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if _is_auto(value):
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _autos(inner, f"{path}.{name}" if path else str(name))
