"""`DsConfig`: what DeepSpeed will make of a ds_config.

The defaults and spellings below are those of deepspeed/runtime/config.py, runtime/precision_config.py,
runtime/zero/config.py, runtime/zero/offload_config.py and utils/config.py; a test compares them with DeepSpeed's own
parser.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ds_agsel.ds_config.raw import TIMER, ZERO, at, autos_in, settings_of, subsection
from ds_agsel.errors import ConfigError

DEVICES = ("none", "cpu", "nvme")

_ADAPTERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (int, float, bool)}  # as pydantic does
_FP16_NAMES = ("float16", "fp16", "half", "torch.float16")


@dataclass(frozen=True)
class Offload:
    """An ``offload_optimizer`` or ``offload_param`` section. ``device`` is one of `DEVICES`, or what was written."""

    device: str = "none"
    nvme_path: str | None = None
    buffer_count: int = 4
    pin_memory: bool = False

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
        timer_synchronizes: DeepSpeed's throughput timer waits for the device at each step.
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
    timer_synchronizes: bool
    autos: tuple[str, ...]
    _unreadable: Mapping[str, str] = field(repr=False)
    _settings: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> DsConfig:
        """Return the settings of the mapping ``raw``, which is not modified."""
        settings = settings_of(raw)
        read = _Reader(settings)
        stage = read.whole(f"{ZERO}.stage", 0)
        optimizer, scheduler = subsection(settings, "optimizer"), subsection(settings, "scheduler")
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
            optimizer_params=MappingProxyType(dict(subsection(optimizer, "params"))),
            scheduler_type=_text(scheduler.get("type")),
            scheduler_params=MappingProxyType(dict(subsection(scheduler, "params"))),
            reduce_bucket_numel=read.whole(f"{ZERO}.reduce_bucket_size", 500_000_000),
            sub_group_numel=read.whole(f"{ZERO}.sub_group_size", 1_000_000_000),
            persistence_threshold_numel=read.whole(f"{ZERO}.stage3_param_persistence_threshold", 100_000),
            max_live_numel=read.whole(f"{ZERO}.stage3_max_live_parameters", 1_000_000_000),
            prefetch_bucket_numel=read.whole(f"{ZERO}.stage3_prefetch_bucket_size", None),
            overlap_comm=read.flag(f"{ZERO}.overlap_comm", stage == 3),
            contiguous_gradients=read.flag(f"{ZERO}.contiguous_gradients", True),
            round_robin_gradients=read.flag(f"{ZERO}.round_robin_gradients", False),
            parameter_alignment=read.flag(f"{ZERO}.parameter_alignment", False),
            timer_synchronizes=read.flag(f"{TIMER}.enabled", True) and read.flag(f"{TIMER}.synchronized", True),
            autos=tuple(autos_in(raw)),
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
        return at(self._settings, path, default)

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
        return at(self._settings, path, None)

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
        section = subsection(subsection(self._settings, ZERO), name)
        device, folder = section.get("device", "none"), section.get("nvme_path")
        if device not in DEVICES:
            self.unreadable[f"{ZERO}.{name}.device"] = unknown_device(name, device)
        count = self.whole(f"{ZERO}.{name}.buffer_count", buffer_count)
        pin_memory = self.flag(f"{ZERO}.{name}.pin_memory", False)
        return Offload(str(device), str(folder) if folder else None, count, pin_memory)

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
    return f"{ZERO}.{name}.device={device!r} is unknown. Use none, cpu or nvme."


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Return the ds_config in the file ``path``, read as DeepSpeed reads it.

    That is JSON, with comments and trailing commas allowed (Hjson). Raises ConfigError if the file can't be read, holds
    no object, or has a key twice.
    """
    import hjson  # what DeepSpeed reads its config with

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


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
