"""What the estimator takes from a ds_config: stage, offload, precision, buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ds_agsel.errors import ConfigError

Device = Literal["none", "cpu", "nvme"]
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES = 4
MOMENT_BYTES = 8  # exp_avg and exp_avg_sq


@dataclass(frozen=True)
class Setup:
    """The settings that memory and traffic hang on. Sizes of buckets are in elements, as in the ds_config.

    ``accumulation_dtype`` is that of gradients summed over micro-steps; DeepSpeed's default is the model's.
    """

    stage: int = 2
    ranks: int = 1
    dtype: str = "bf16"
    accumulation_dtype: str = "bf16"
    accumulation_steps: int = 1
    offload_optimizer: Device = "none"
    offload_param: Device = "none"
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
    assumed: tuple[str, ...] = ()

    @property
    def item_bytes(self) -> int:
        """Bytes of one model weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def accumulation_bytes(self) -> int:
        return DTYPE_BYTES[self.accumulation_dtype]

    @property
    def visiting_bytes(self) -> int:
        """Bytes that travel with an element of a block that visits the accelerator."""
        return MOMENT_BYTES + (MASTER_BYTES if self.keep_master == "host" else 0)

    @property
    def keeps_fp32_partitions(self) -> bool:
        """Whether gradients are summed in an fp32 partition (stage_1_and_2.py, _use_compact_grad_partition_buffer)."""
        return self.accumulation_dtype == "fp32" != self.dtype

    def but(self, **changes: Any) -> Setup:
        return replace(self, **changes)


def read_setup(ds_config: Mapping[str, Any], ranks: int = 1) -> Setup:
    """The setup of ``ds_config`` on ``ranks`` accelerators; DeepSpeed's defaults where it says nothing or "auto".

    Raises ConfigError for values that no estimate can be made of.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks={ranks} is not a number of accelerators. Use 1 or more.")
    assumed: list[str] = []

    def get(section: Mapping[str, Any], path: str, default: Any, kind: type = int) -> Any:
        value = section.get(path.rpartition(".")[2], default)
        if value == "auto":
            assumed.append(f'{path}="auto" is taken as {str(default).lower()}')
            return default
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            return int(value)
        raise ConfigError(f"{path}={value!r} is not {'true or false' if kind is bool else 'a number of 0 or more'}.")

    zero = _section(ds_config, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_optimization.stage={stage!r} can't be estimated. Stages 1, 2 and 3 are allowed.")
    offload = _section(zero, "offload_optimizer")
    dtype = "fp32"
    for name, key in (("bf16", "bf16"), ("bf16", "bfloat16"), ("fp16", "fp16")):
        if get(_section(ds_config, key), f"{key}.enabled", key != "fp16" and key in ds_config, bool):
            dtype = name
    z = "zero_optimization."
    return Setup(
        stage=stage,
        ranks=ranks,
        dtype=dtype,
        accumulation_dtype=_dtype(_section(ds_config, "data_types").get("grad_accum_dtype"), dtype),
        accumulation_steps=max(1, get(ds_config, "gradient_accumulation_steps", 1)),
        offload_optimizer=_device(offload, "offload_optimizer"),
        offload_param=_device(_section(zero, "offload_param"), "offload_param"),
        reduce_bucket_numel=get(zero, z + "reduce_bucket_size", 500_000_000),
        overlap_comm=get(zero, z + "overlap_comm", stage == 3, bool),
        contiguous_gradients=get(zero, z + "contiguous_gradients", True, bool),
        round_robin_gradients=get(zero, z + "round_robin_gradients", False, bool),
        parameter_alignment=get(zero, z + "parameter_alignment", False, bool),
        sub_group_numel=get(zero, z + "sub_group_size", 1_000_000_000),
        persistence_threshold_numel=get(zero, z + "stage3_param_persistence_threshold", 100_000),
        max_live_numel=get(zero, z + "stage3_max_live_parameters", 1_000_000_000),
        nvme_buffer_count=get(offload, z + "offload_optimizer.buffer_count", 4),
        assumed=tuple(assumed),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _device(section: Mapping[str, Any], name: str) -> Device:
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(f"zero_optimization.{name}.device={device!r} is unknown. Use none, cpu or nvme.")
    return device


def _dtype(value: Any, default: str) -> str:
    names = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", None: default, "auto": default}
    dtype = names.get(value, value)
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"data_types.grad_accum_dtype={value!r} is unknown. Use one of {', '.join(DTYPE_BYTES)}.")
    return str(dtype)
