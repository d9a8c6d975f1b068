"""What the estimator takes from a ds_config: stage, offload, precision, buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from ds_agsel.ds_config import DsConfig, Offload
from ds_agsel.errors import ConfigError
from ds_agsel.residency.arena import bytes_of
from ds_agsel.residency.rooms import master_room, moment_rooms

Device = Literal["none", "cpu", "nvme"]
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES = 4
MOMENT_BYTES = 8  # exp_avg and exp_avg_sq, fp32


@dataclass(frozen=True)
class Setup:
    """The settings that memory and traffic depend on. Sizes of buckets are in elements, as in the ds_config.

    ``accumulation_dtype`` is that of gradients summed over micro-steps; DeepSpeed's default is the model's.
    ``pin_memory`` is that of ``offload_optimizer``. ``rounds_page_locked``: torch takes a power of 2 for each
    piece of page-locked memory; False for an accelerator that is the processor, which locks none.
    """

    stage: int = 2
    ranks: int = 1
    dtype: str = "bf16"
    accumulation_dtype: str = "bf16"
    accumulation_steps: int = 1
    offload_optimizer: Device = "none"
    offload_param: Device = "none"
    pin_memory: bool = False
    rounds_page_locked: bool = True
    reduce_bucket_numel: int = 500_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    sub_group_numel: int = 1_000_000_000
    persistence_threshold_numel: int = 100_000
    max_live_numel: int = 1_000_000_000
    nvme_buffer_count: int = 4
    keep_master: str = "host"
    state_budget_bytes: int | None = None
    on_reentry: str = "keep"
    state_dtype: str = "fp32"
    master_weights: str = "fp32"
    assumed: tuple[str, ...] = ()

    @property
    def item_bytes(self) -> int:
        """Bytes of one model weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def accumulation_bytes(self) -> int:
        """Bytes of an element of accumulated gradients."""
        return DTYPE_BYTES[self.accumulation_dtype]

    @property
    def is_cache(self) -> bool:
        """Whether the state of a visiting block that is not selected any more stays while there is room."""
        return self.state_budget_bytes is not None and self.on_reentry != "reset"

    @property
    def keeps_fp32_partitions(self) -> bool:
        """Whether gradients are summed in an fp32 partition (stage_1_and_2.py, _use_compact_grad_partition_buffer)."""
        return self.accumulation_dtype == "fp32" != self.dtype

    @property
    def resting_master_bytes(self) -> int:
        """Bytes of one master weight where it rests, beside the model weight."""
        return bytes_of(master_room(self.master_weights, 1))

    def visiting_bytes(self, numel: int) -> int:
        """Return the bytes that travel with a group of ``numel`` elements whose block visits the accelerator."""
        return sum(self.visiting_sizes(numel))

    def resting_bytes(self, numel: int) -> int:
        """Return the bytes of a group's two moments of ``numel`` elements each, where they rest."""
        return sum(self.moment_sizes(numel))

    def moment_sizes(self, numel: int) -> list[int]:
        """Return the bytes of each tensor in which a group's two moments of ``numel`` elements each rest."""
        return [bytes_of(room) for room in moment_rooms(self.state_dtype, numel).values()]

    def visiting_sizes(self, numel: int) -> list[int]:
        """Return the bytes of each tensor that travels with a group of ``numel`` elements."""
        masters = [self.resting_master_bytes * numel] if self.keep_master == "host" else []
        return [*masters, *self.moment_sizes(numel)]

    def but(self, **changes: Any) -> Setup:
        """Return a copy with ``changes``."""
        return replace(self, **changes)


def read_setup(raw: Mapping[str, Any], ranks: int = 1) -> Setup:
    """Return the setup of the ds_config ``raw`` on ``ranks`` accelerators.

    DeepSpeed's defaults replace settings that are missing or "auto". Raises ConfigError for values that can't be
    estimated.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks={ranks} is not a number of accelerators. Use 1 or more.")
    ds_config = DsConfig.of(raw)
    ds_config.require_readable()
    if ds_config.stage not in (1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage={ds_config.stage!r} can't be estimated. Stages 1, 2 and 3 are allowed."
        )
    dtype = "bf16" if ds_config.bf16_is_auto and not ds_config.is_half else ds_config.precision
    setup = Setup(
        stage=ds_config.stage,
        ranks=ranks,
        dtype=dtype,
        accumulation_dtype=_dtype(ds_config.accumulation_dtype, dtype),
        accumulation_steps=ds_config.accumulation_steps or 1,
        offload_optimizer=_device(ds_config.offload_optimizer),
        offload_param=_device(ds_config.offload_param),
        pin_memory=ds_config.offload_optimizer.pin_memory,
        reduce_bucket_numel=ds_config.reduce_bucket_numel,
        overlap_comm=ds_config.overlap_comm,
        contiguous_gradients=ds_config.contiguous_gradients,
        round_robin_gradients=ds_config.round_robin_gradients,
        parameter_alignment=ds_config.parameter_alignment,
        sub_group_numel=ds_config.sub_group_numel,
        persistence_threshold_numel=ds_config.persistence_threshold_numel,
        max_live_numel=ds_config.max_live_numel,
        nvme_buffer_count=ds_config.offload_optimizer.buffer_count,
    )
    return setup.but(assumed=tuple(_assumed(ds_config, setup)))


_ASSUMED = {  # the settings here that may be "auto": by the end of their path
    "bf16.enabled": "dtype", "bfloat16.enabled": "dtype", "gradient_accumulation_steps": "accumulation_steps",
    "reduce_bucket_size": "reduce_bucket_numel", "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients", "sub_group_size": "sub_group_numel",
    "param_persistence_threshold": "persistence_threshold_numel", "max_live_parameters": "max_live_numel",
    "offload_optimizer.buffer_count": "nvme_buffer_count", "fp16.enabled": "dtype",
}  # fmt: skip


def _assumed(ds_config: DsConfig, setup: Setup) -> Iterator[str]:
    for path in ds_config.autos:
        field = next((field for end, field in _ASSUMED.items() if path.endswith(end)), None)
        if field is not None:
            value = getattr(setup, field)
            if field == "dtype":
                value = value == ("fp16" if path.startswith("fp16") else "bf16")
            yield f'{path}="auto" is taken as {str(value).lower()}'


def _device(offload: Offload) -> Device:
    return cast(Device, offload.device)  # readable: one of the three


def _dtype(value: str | None, default: str) -> str:
    names = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", None: default}
    dtype = names.get(value, value)
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"data_types.grad_accum_dtype={value!r} is unknown. Use one of {', '.join(DTYPE_BYTES)}.")
    return str(dtype)
