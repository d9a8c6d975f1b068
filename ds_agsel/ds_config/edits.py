"""Changes of a ds_config. Each returns a new mapping and leaves the caller's as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_agsel.ds_config.raw import DEPRECATED_OFFLOADS, TIMER, ZERO, raw_zero_section, subsection, without_autos
from ds_agsel.ds_config.reading import DsConfig
from ds_agsel.errors import ConfigError

# Params of schedulers, DeepSpeed's (lr_schedules.py) and torch's, that may be lists with a value per param group.
_SCHEDULER_LISTS = frozenset(
    {
        "warmup_min_lr", "warmup_max_lr", "lr_range_test_min_lr", "cycle_min_lr", "cycle_max_lr", "cycle_min_mom",
        "cycle_max_mom", "max_lr", "base_lr", "min_lr", "max_momentum", "base_momentum",
    }
)  # fmt: skip


def with_zero(raw: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Return ``raw`` with ``settings`` in its ZeRO section."""
    return {**raw, ZERO: {**raw_zero_section(raw), **settings}}


def without_zero(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without its ZeRO section."""
    return {key: value for key, value in raw.items() if key != ZERO}


def with_offload_to_cpu(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with the optimizer on the host; states that are already offloaded are not moved."""
    if DsConfig.of(raw).offload_optimizer.is_on:
        return dict(raw)
    zero = raw_zero_section(raw)
    offload = {"pin_memory": True, **without_autos(subsection(zero, "offload_optimizer")), "device": "cpu"}
    zero = {key: value for key, value in zero.items() if DEPRECATED_OFFLOADS.get(key) != "offload_optimizer"}
    return {**raw, ZERO: {**zero, "offload_optimizer": offload}}


def without_pipelined_swapping(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with DeepSpeed's own overlap of NVMe reads and writes off, where states are on NVMe."""
    if DsConfig.of(raw).offload_optimizer.device != "nvme":
        return dict(raw)
    offload = subsection(raw_zero_section(raw), "offload_optimizer")
    return with_zero(raw, offload_optimizer={**offload, "pipeline_read": False, "pipeline_write": False})


def with_torch_adam(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with ``torch_adam`` set in its optimizer section, if it has one."""
    return _with_params(raw, "optimizer", torch_adam=True) if raw.get("optimizer") else dict(raw)


def without_synchronizing_timer(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with DeepSpeed's throughput timer not waiting for the device, unless the user has said either."""
    read = DsConfig.of(raw)
    if not read.timer_synchronizes or read.value(f"{TIMER}.synchronized") is not None:
        return dict(raw)
    outer, inner = TIMER.split(".")
    timers = subsection(raw, outer)
    return {**raw, outer: {**timers, inner: {**subsection(timers, inner), "synchronized": False}}}


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
    return {**raw, name: {**subsection(raw, name), "enabled": enabled}}


def with_batch(raw: Mapping[str, Any], micro_batch_size: int, accumulation_steps: int) -> dict[str, Any]:
    """Return ``raw`` with these rows per micro-batch and accumulation steps; DeepSpeed multiplies them itself."""
    kept = {key: value for key, value in raw.items() if key != "train_batch_size"}
    kept["train_micro_batch_size_per_gpu"] = micro_batch_size
    return {**kept, "gradient_accumulation_steps": accumulation_steps}


def _with_params(raw: Mapping[str, Any], name: str, **params: Any) -> dict[str, Any]:
    section = subsection(raw, name)
    return {**raw, name: {**section, "params": {**subsection(section, "params"), **params}}}
