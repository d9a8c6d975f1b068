"""The ds_config of a setting that `ds-agsel fit` tries, and writes if it is the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_agsel.config import SECTION
from ds_agsel.estimate.setting import Setting
from ds_agsel.sparse_grad_section import SPARSE_GRAD

_BUCKET_NUMEL = 50_000_000
# Weights that ZeRO-3 holds beyond those of the layer at work; DeepSpeed's own default is 10^9.
_MAX_LIVE_NUMEL = 200_000_000
# The fields of the section that are written if they differ from their defaults.
_SECTION_DEFAULTS = {
    "keep_master": "host", "master_weights": "fp32", "state_dtype": "fp32", "select_every": 1, "on_reentry": "keep",
    "explore_on": "batch",
}  # fmt: skip
_UNIT_FIELDS: Mapping[str, dict[str, Any]] = {
    "block": {}, "module": {"granularity": "module"}, "entries": {SPARSE_GRAD: {}}
}  # fmt: skip


def ds_config_of(setting: Setting, accumulation_steps: int, nvme_path: str) -> dict[str, Any]:
    """Return a ds_config for `launch/train.py`, and for others once they have replaced what it says "auto" for."""
    return {
        "train_micro_batch_size_per_gpu": setting.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": _zero(setting, nvme_path),
        **_aio(setting),
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"},
        },
        "steps_per_print": 1_000_000,
        SECTION: _section(setting),
    }


def _zero(setting: Setting, nvme_path: str) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": setting.stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": _BUCKET_NUMEL,
    }
    if setting.home != "visit":
        zero |= {"offload_optimizer": _offload("cpu" if setting.home == "host" else "nvme", setting, nvme_path)}
    if setting.stage < 3:
        return zero | {"allgather_bucket_size": _BUCKET_NUMEL}
    if setting.offload_param != "none":
        zero |= {"offload_param": _offload(setting.offload_param, setting, nvme_path)}
    return zero | {
        "stage3_max_live_parameters": _MAX_LIVE_NUMEL,
        "stage3_max_reuse_distance": _MAX_LIVE_NUMEL,
        # offload_param to NVMe stops with a look-ahead: DeepSpeed 0.19, partitioned_param_coordinator.py.
        "stage3_prefetch_bucket_size": 0 if setting.offload_param == "nvme" else _BUCKET_NUMEL,
    }


def _offload(device: str, setting: Setting, nvme_path: str) -> dict[str, Any]:
    path = {"nvme_path": nvme_path} if device == "nvme" else {}
    return {"device": device, **path, "pin_memory": setting.pin_memory}


def _aio(setting: Setting) -> dict[str, Any]:
    if "nvme" not in (setting.home, setting.offload_param):
        return {}
    return {
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    }


def _section(setting: Setting) -> dict[str, Any]:
    section: dict[str, Any] = {"policy": "adagrad_select", "select_percent": setting.select_percent}
    if setting.home == "visit":
        section["step_device"] = "accelerator"
    section |= _UNIT_FIELDS[setting.unit]
    changed = {field: getattr(setting, field) for field in _SECTION_DEFAULTS}
    return section | {field: value for field, value in changed.items() if value != _SECTION_DEFAULTS[field]}
