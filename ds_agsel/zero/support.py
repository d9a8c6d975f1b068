"""What this package can't do, refused at start-up with the setting, its value and what to do instead."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_agsel.config import SelectionConfig
from ds_agsel.errors import ConfigError

STAGES = (1, 2, 3)
ADAM_NAMES = ("adam", "adamw")
AIO_REMEDY = "apt-get install libaio-dev, or conda install libaio"


def refuse_unsupported(ds_config: Mapping[str, Any], model: nn.Module, mpu: Any, config: SelectionConfig) -> None:
    """Raise ConfigError for the first setting of ``ds_config``, or part of ``model``, that can't be used."""
    problems = unsupported(ds_config, config, model, mpu) or missing_for_nvme(ds_config)
    if problems:
        raise ConfigError(problems[0])


def missing_for_nvme(ds_config: Mapping[str, Any]) -> list[str]:
    """A line for each thing that this machine lacks for what ``ds_config`` keeps on NVMe."""
    from ds_agsel.zero import compat

    zero = _section(ds_config, "zero_optimization")
    problems = []
    for name in ("offload_optimizer", "offload_param"):
        section = _section(zero, name)
        if str(section.get("device", "none")) != "nvme":
            continue
        if not compat.can_swap():
            problems.append(
                f"zero_optimization.{name}.device='nvme' needs DeepSpeed's asynchronous I/O op, which can't be built "
                f"without libaio. Install it ({AIO_REMEDY}), or use 'cpu' or 'none'."
            )
        reason = _no_direct_io(section["nvme_path"])
        if reason is not None:
            problems.append(
                f"zero_optimization.{name}.nvme_path={str(section['nvme_path'])!r} can't be used: {reason}. Name a "
                "folder on a local disk (ext4 or xfs, not tmpfs) that this user can write to."
            )
    return problems


def _no_direct_io(folder: str | os.PathLike[str]) -> str | None:
    """Why files in ``folder``, which is made where it is missing, can't be written around the page cache."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        return f"{error.strerror} ({'direct I/O' if error.errno == errno.EINVAL else 'writing'})"
    return None


def unsupported(
    ds_config: Mapping[str, Any], config: SelectionConfig, model: nn.Module | None = None, mpu: Any = None
) -> list[str]:
    """A line for each setting of ``ds_config``, and each part of ``model`` where there is one, that can't be used."""
    problems: list[str] = []
    _refuse = partial(_add_refusal, problems)
    zero = _section(ds_config, "zero_optimization")
    offload = _section(zero, "offload_optimizer")
    bf16 = _section(ds_config, "bf16") or _section(ds_config, "bfloat16")
    fp16 = _section(ds_config, "fp16")
    autocast = _section(ds_config, "torch_autocast")
    stage = zero.get("stage", 0)
    offload_device = str(offload.get("device", "none"))

    if stage not in STAGES:
        hint = {0: "use 1, which keeps the same weights on each rank"}
        problems.append(
            f"zero_optimization.stage={stage} can't be used with adagrad_select. Stages 1, 2 and 3 are allowed: "
            f"{hint.get(stage, 'use one of them')}."
        )
    if zero.get("zenflow") is not None:
        _refuse("zero_optimization.zenflow", "it selects gradients in its own way", "Remove one of the two sections")
    if offload.get("super_offload"):
        setting = "zero_optimization.offload_optimizer.super_offload=true"
        _refuse(setting, "it steps outside ZeRO's loop", "Set it to false")
    for name in ("offload_optimizer", "offload_param"):
        section = _section(zero, name)
        device = str(section.get("device", "none"))
        if device == "nvme" and stage != 3:
            _refuse(
                f"zero_optimization.{name}.device='nvme' with zero_optimization.stage={stage}",
                "DeepSpeed offloads to NVMe with stage 3 alone", "Use stage 3, or 'cpu' or 'none'",
            )  # fmt: skip
        elif device == "nvme" and not section.get("nvme_path"):
            problems.append(
                f"zero_optimization.{name}.device='nvme' needs zero_optimization.{name}.nvme_path: a folder on the "
                "device. Set it."
            )
        elif device == "nvme" and name == "offload_param":
            _refuse_for_weights_on_nvme(zero, bool(bf16.get("enabled") or fp16.get("enabled")), _refuse)
        elif device not in ("none", "cpu", "nvme"):
            problems.append(f"zero_optimization.{name}.device={device!r} is unknown. Use none, cpu or nvme.")
    if stage == 3:
        _refuse_for_stage3(zero, _refuse)
    if offload.get("ratio", 1.0) != 1.0:
        _refuse(
            f"zero_optimization.offload_optimizer.ratio={offload['ratio']}", "partial offload splits blocks",
            "Set it to 1.0",
        )  # fmt: skip
    if config.step_device == "cpu" and offload_device == "none":
        problems.append(
            "adagrad_select.step_device='cpu' and zero_optimization.offload_optimizer.device='none' contradict each "
            "other. Set offload_optimizer.device to 'cpu', or step_device to null."
        )
    if config.step_device == "accelerator" and offload_device != "none":
        problems.append(
            f"adagrad_select.step_device='accelerator' and zero_optimization.offload_optimizer.device="
            f"{offload_device!r} contradict each other: the one steps on the accelerator, the other on the host. Set "
            "offload_optimizer.device to 'none' (states are then in host memory all the same, and visit the "
            "accelerator), or step_device to null."
        )
    if config.explore_on != "batch" and stage == 1:
        _refuse(
            f"adagrad_select.explore_on={config.explore_on!r} with zero_optimization.stage={stage}",
            "it keeps all micro-batches' gradients whole to the end of a step",
            "Use stage 2 or 3, or explore_on='batch'",
        )  # fmt: skip
    if zero.get("elastic_checkpoint"):
        _refuse(
            "zero_optimization.elastic_checkpoint=true", "it asks every block for the state of the first",
            "Set it to false",
        )  # fmt: skip
    if _section(ds_config, "hybrid_engine").get("enabled"):
        _refuse("hybrid_engine.enabled=true", "it replaces the engine", "Set it to false")
    if _section(ds_config, "compile").get("deepcompile"):
        _refuse("compile.deepcompile=true", "it compiles the gradients of all blocks in", "Set it to false")
    if ds_config.get("managed_gradient_accumulation") is False:
        _refuse("managed_gradient_accumulation=false", "the window of a choice is DeepSpeed's own", "Set it to true")
    if _section(ds_config, "checkpoint").get("writer") is not None:
        _refuse("checkpoint.writer", "what it writes is not there yet when a save returns", "Remove it")
    if _section(ds_config, "datastates_ckpt").get("enabled"):
        _refuse("datastates_ckpt.enabled=true", "a save returns before it has written", "Set it to false")
    for key, section in (("bf16", bf16), ("fp16", fp16)):
        for name in (f"{key}_master_weights_and_grads", f"{key}_optimizer_states"):
            if section.get(name):
                _refuse(f"{key}.{name}=true", "small updates round away without fp32 masters", "Set it to false")
    if autocast.get("enabled") and str(autocast.get("dtype", "")) in ("float16", "fp16", "half", "torch.float16"):
        _refuse(
            f"torch_autocast.dtype={autocast['dtype']!r}", "its loss scaler would skip some blocks of a step only",
            "Use 'bfloat16', or the fp16 section",
        )  # fmt: skip
    accumulation = _section(ds_config, "data_types").get("grad_accum_dtype")
    if bf16.get("enabled") and accumulation == "fp32" and stage == 1 and offload_device == "none":
        _refuse(
            "data_types.grad_accum_dtype='fp32' with bf16 and zero_optimization.stage=1",
            "DeepSpeed then uses its BF16_Optimizer (engine.py:2310)", "Use stage 2",
        )  # fmt: skip
    for setting, size in (
        ("tensor_parallel.autotp_size", _section(ds_config, "tensor_parallel").get("autotp_size", 0)),
        ("sequence_parallel_size", ds_config.get("sequence_parallel_size", 1)),
    ):
        if isinstance(size, int) and size > 1:
            _refuse(f"{setting}={size}", "block scores are summed over data-parallel ranks alone", "Set it to 1")
    if mpu is not None:
        _refuse("initialize(mpu=...)", "block scores are summed over data-parallel ranks alone", "Leave mpu out")
    if model is not None:
        _refuse_model(model, _refuse)
    return problems


def _refuse_for_stage3(zero: Mapping[str, Any], _refuse: Callable[[str, str, str], None]) -> None:
    if zero.get("mics_shard_size", -1) > 0:
        _refuse(
            f"zero_optimization.mics_shard_size={zero['mics_shard_size']}", "MiCS has an optimizer of its own",
            "Leave it out",
        )  # fmt: skip
    if zero.get("zero_hpz_partition_size", 1) > 1:
        _refuse(
            f"zero_optimization.zero_hpz_partition_size={zero['zero_hpz_partition_size']}",
            "it drops the second copies of all weights at each step, updated or not", "Set it to 1",
        )  # fmt: skip
    for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            _refuse(f"zero_optimization.{name}=true", "it is not tested with frozen blocks", "Set it to false")


def _refuse_for_weights_on_nvme(
    zero: Mapping[str, Any], is_half: bool, _refuse: Callable[[str, str, str], None]
) -> None:
    """What plain DeepSpeed 0.19.8 can't do either."""
    if zero.get("stage3_prefetch_bucket_size", zero.get("prefetch_bucket_size")) != 0:
        _refuse(
            "zero_optimization.offload_param.device='nvme' with a zero_optimization.stage3_prefetch_bucket_size other "
            "than 0",
            "DeepSpeed then reads a parameter for forward and for backward at once, and stops",
            "Set stage3_prefetch_bucket_size to 0",
        )  # fmt: skip
    if not is_half:
        _refuse(
            "zero_optimization.offload_param.device='nvme' without bf16 and fp16",
            "DeepSpeed takes the weights that it reads for bf16", "Set bf16.enabled to true",
        )  # fmt: skip


def optimizer_problem(ds_config: Mapping[str, Any]) -> str | None:
    """What is wrong with the optimizer that ``ds_config`` names, or does not name; None where nothing is."""
    name = str(_section(ds_config, "optimizer").get("type", ""))
    if name.lower() in ADAM_NAMES:
        return None
    return (
        f"optimizer.type={name!r} can't be used with adagrad_select. Adam and AdamW are allowed, in the "
        "ds_config's optimizer section or as an object given to initialize."
    )


def _refuse_model(model: nn.Module, _refuse: Callable[[str, str, str], None]) -> None:
    from deepspeed.moe.utils import has_moe_layers
    from deepspeed.runtime.pipe.module import PipelineModule

    if isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
        _refuse(
            f"model={type(model).__name__}, compiled as a whole,",
            "torch compiles it anew for each pattern of frozen blocks and goes back to eager after 8",
            "Give the model as it is, then call engine.compile(), which compiles layer by layer",
        )  # fmt: skip
    if isinstance(model, PipelineModule):
        _refuse(f"model={type(model).__name__}", "a pipeline stage sees only some blocks", "Use the plain module")
    if has_moe_layers(model)[0]:
        _refuse(
            f"model={type(model).__name__} with DeepSpeed MoE layers", "experts live on different ranks",
            "Use experts that are ordinary modules",
        )  # fmt: skip


def _add_refusal(problems: list[str], what: str, why: str, remedy: str) -> None:
    problems.append(f"{what} can't be used with adagrad_select: {why}. {remedy}, or disable adagrad_select.")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
