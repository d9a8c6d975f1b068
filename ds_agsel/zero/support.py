"""Refuse unsupported settings at start-up, each with its value and the remedy."""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DEVICES, DsConfig, unknown_device
from ds_agsel.errors import ConfigError
from ds_agsel.zero import rows
from ds_agsel.zero.states.forms import LOWBIT_REMEDY

STAGES = (1, 2, 3)
ADAM_NAMES = ("adam", "adamw")
AIO_REMEDY = "apt-get install libaio-dev, or conda install libaio"


def refuse_unsupported(ds_config: DsConfig, model: nn.Module, mpu: Any, config: SelectionConfig) -> None:
    """Raise ConfigError for the first setting of ``ds_config``, or part of ``model``, that can't be used."""
    problems = unsupported(ds_config, config, model, mpu) or missing_for_nvme(ds_config)
    if problems:
        raise ConfigError(problems[0])


def missing_for_nvme(ds_config: DsConfig) -> list[str]:
    """Return one line per requirement of ``ds_config``'s NVMe offload that this machine lacks."""
    from ds_agsel.zero import compat

    problems = []
    for name, offload in _offloads(ds_config):
        if offload.device != "nvme" or offload.nvme_path is None:
            continue
        if not compat.can_swap():
            problems.append(
                f"zero_optimization.{name}.device='nvme' needs DeepSpeed's asynchronous I/O op, which can't be built "
                f"without libaio. Install it ({AIO_REMEDY}), or use 'cpu' or 'none'."
            )
        reason = _no_direct_io(offload.nvme_path)
        if reason is not None:
            problems.append(
                f"zero_optimization.{name}.nvme_path={offload.nvme_path!r} can't be used: {reason}. Name a "
                "folder on a local disk (ext4 or xfs, not tmpfs) that this user can write to."
            )
    return problems


def _offloads(ds_config: DsConfig) -> tuple[tuple[str, Any], ...]:
    return (("offload_optimizer", ds_config.offload_optimizer), ("offload_param", ds_config.offload_param))


def _no_direct_io(folder: str | os.PathLike[str]) -> str | None:
    """Return why files in ``folder``, which is made if missing, can't be written around the page cache."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        return f"{error.strerror} ({'direct I/O' if error.errno == errno.EINVAL else 'writing'})"
    return None


def unsupported(
    ds_config: DsConfig, config: SelectionConfig, model: nn.Module | None = None, mpu: Any = None
) -> list[str]:
    """Return a line for each setting of ``ds_config``, and part of ``model`` where there is one, that can't be used."""
    problems = [rule.text(ds_config, config) for rule in _RULES if rule.applies(ds_config, config)]
    if mpu is not None:
        problems.append(_refusal("initialize(mpu=...)", _OTHER_RANKS, "Leave mpu out"))
    problems += rows.problems(ds_config, config, model)
    return problems if model is None else problems + _model_problems(model)


# ---------------------------------------------------------------- the rules, in the order in which they are told


@dataclass(frozen=True)
class _Rule:
    """A combination of settings that can't be used, and its error message."""

    applies: Callable[[DsConfig, SelectionConfig], Any]
    text: Callable[[DsConfig, SelectionConfig], str]


def _refusal(what: str, why: str, remedy: str) -> str:
    return f"{what} can't be used with adagrad_select: {why}. {remedy}, or disable adagrad_select."


def _refused(
    applies: Callable[[DsConfig, SelectionConfig], Any], what: Callable[[DsConfig, SelectionConfig], str] | str,
    why: str, remedy: str,
) -> _Rule:  # fmt: skip
    def text(ds: DsConfig, config: SelectionConfig) -> str:
        return _refusal(what if isinstance(what, str) else what(ds, config), why, remedy)

    return _Rule(applies, text)


def _flag(
    path: str, why: str, remedy: str = "Set it to false", only: Callable[[DsConfig], bool] | None = None
) -> _Rule:
    """Return a rule against a setting that is true; ``only`` says when it applies."""
    return _refused(
        lambda ds, _: bool(ds.value(path)) and (only is None or only(ds)),
        f"{path}=true", why, "Set it to false",
    )  # fmt: skip


def _above(path: str, limit: int, why: str, remedy: str, only: Callable[[DsConfig], bool] | None = None) -> _Rule:
    """Return a rule against a number above ``limit``."""

    def applies(ds: DsConfig, _: SelectionConfig) -> bool:
        value = ds.value(path, limit)
        return isinstance(value, int) and value > limit and (only is None or only(ds))

    return _refused(applies, lambda ds, _: f"{path}={ds.value(path)}", why, remedy)


def _offload_rules(name: str) -> tuple[_Rule, ...]:
    def is_nvme(ds: DsConfig) -> bool:
        return dict(_offloads(ds))[name].device == "nvme"

    def device(ds: DsConfig) -> str:
        return str(dict(_offloads(ds))[name].device)

    return (
        _refused(
            lambda ds, _: is_nvme(ds) and ds.stage != 3,
            lambda ds, _: f"zero_optimization.{name}.device='nvme' with zero_optimization.stage={ds.stage}",
            "DeepSpeed offloads to NVMe with stage 3 alone", "Use stage 3, or 'cpu' or 'none'",
        ),
        _Rule(
            lambda ds, _: is_nvme(ds) and ds.stage == 3 and dict(_offloads(ds))[name].nvme_path is None,
            lambda ds, _: f"zero_optimization.{name}.device='nvme' needs zero_optimization.{name}.nvme_path: a folder "
            "on the device. Set it.",
        ),
        _Rule(lambda ds, _: device(ds) not in DEVICES, lambda ds, _: unknown_device(name, device(ds))),
    )  # fmt: skip


def _split_refused(
    applies: Callable[[DsConfig, SelectionConfig], Any], what: Callable[[DsConfig, SelectionConfig], str],
    why: str, remedy: str,
) -> _Rule:  # fmt: skip
    return _Rule(
        lambda ds, config: config.master_weights == "split" and applies(ds, config),
        lambda ds, config: (
            f"adagrad_select.master_weights='split' can't be used with {what(ds, config)}: {why}. "
            f"{remedy}, or use master_weights='fp32'."
        ),
    )


def _is_stage3(ds: DsConfig) -> bool:
    return ds.stage == 3


def _has_weights_on_nvme(ds: DsConfig) -> bool:
    return ds.offload_param.device == "nvme" and ds.stage == 3 and ds.offload_param.nvme_path is not None


def _sparse_grad_on_nvme(name: str, why: str) -> _Rule:
    return _refused(
        lambda ds, config: config.sparse_grad is not None and dict(_offloads(ds))[name].device == "nvme",
        f"adagrad_select.sparse_grad with zero_optimization.{name}.device='nvme'",
        why, f"Set {name}.device to 'cpu' or 'none'",
    )  # fmt: skip


_OTHER_RANKS = "block scores are summed over data-parallel ranks alone"
_RATIO = "zero_optimization.offload_optimizer.ratio"
_NO_MASTERS = "small updates round away without fp32 masters"
_RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda ds, _: ds.stage not in STAGES,
        lambda ds, _: f"zero_optimization.stage={ds.value('zero_optimization.stage', 0)!r} can't be used with "
        "adagrad_select. Stages 1, 2 and 3 are allowed: "
        f"{'use 1, which keeps the same weights on each rank' if ds.stage == 0 else 'use one of them'}.",
    ),
    _refused(
        lambda ds, _: ds.value("zero_optimization.zenflow") is not None,
        "zero_optimization.zenflow", "it selects gradients in its own way", "Remove one of the two sections",
    ),
    _flag("zero_optimization.offload_optimizer.super_offload", "it steps outside ZeRO's loop"),
    *_offload_rules("offload_optimizer"),
    *_offload_rules("offload_param"),
    # The next two plain DeepSpeed 0.19.8 can't do either.
    _refused(
        lambda ds, _: _has_weights_on_nvme(ds) and ds.prefetch_bucket_numel != 0,
        "zero_optimization.offload_param.device='nvme' with a zero_optimization.stage3_prefetch_bucket_size other "
        "than 0",
        "DeepSpeed then reads a parameter for forward and for backward at once, and stops",
        "Set stage3_prefetch_bucket_size to 0",
    ),
    _refused(
        lambda ds, _: _has_weights_on_nvme(ds) and not ds.is_half,
        "zero_optimization.offload_param.device='nvme' without bf16 and fp16",
        "DeepSpeed takes the weights that it reads for bf16", "Set bf16.enabled to true",
    ),
    _above("zero_optimization.mics_shard_size", 0, "MiCS has an optimizer of its own", "Leave it out", _is_stage3),
    _above(
        "zero_optimization.zero_hpz_partition_size", 1,
        "it drops the second copies of all weights at each step, updated or not", "Set it to 1", _is_stage3,
    ),
    *(
        _flag(f"zero_optimization.{name}", "it is not tested with frozen blocks", only=_is_stage3)
        for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
    ),
    _refused(
        lambda ds, _: ds.value(_RATIO, 1.0) != 1.0,
        lambda ds, _: f"{_RATIO}={ds.value(_RATIO)}",
        "partial offload splits blocks", "Set it to 1.0",
    ),
    _Rule(
        lambda ds, config: config.step_device == "cpu" and not ds.offload_optimizer.is_on,
        lambda *_: "adagrad_select.step_device='cpu' and zero_optimization.offload_optimizer.device='none' contradict "
        "each other. Set offload_optimizer.device to 'cpu', or step_device to null.",
    ),
    _Rule(
        lambda ds, config: config.step_device == "accelerator" and ds.offload_optimizer.is_on,
        lambda ds, _: "adagrad_select.step_device='accelerator' and zero_optimization.offload_optimizer.device="
        f"{ds.offload_optimizer.device!r} contradict each other: the one steps on the accelerator, the other on the "
        "host. Set offload_optimizer.device to 'none' (states are then in host memory all the same, and visit the "
        "accelerator), or step_device to null.",
    ),
    _Rule(
        lambda ds, config: config.state_dtype == "int8" and importlib.util.find_spec("bitsandbytes") is None,
        lambda *_: f"adagrad_select.state_dtype='int8' needs bitsandbytes, which is not installed. {LOWBIT_REMEDY}, or "
        "use state_dtype='bf16', which needs nothing.",
    ),
    _split_refused(
        lambda ds, _: ds.precision != "bf16",
        lambda ds, _: f"{ds.precision} model weights", "it keeps what bfloat16 model weights lack",
        "Set bf16.enabled to true",
    ),
    _split_refused(
        lambda ds, _: ds.autocast_dtype is not None,
        lambda *_: "torch_autocast", "it is not tested", "Set torch_autocast.enabled to false",
    ),
    _split_refused(
        lambda ds, _: ds.offload_param.is_on,
        lambda ds, _: f"zero_optimization.offload_param.device={ds.offload_param.device!r}", "it is not tested",
        "Use 'none'",
    ),
    _split_refused(
        lambda _, config: config.sparse_grad is not None,
        lambda *_: "adagrad_select.sparse_grad", "its matrices are written beside DeepSpeed's step", "Leave it out",
    ),
    _refused(
        lambda ds, config: config.explore_on != "batch" and ds.stage == 1,
        lambda ds, config: f"adagrad_select.explore_on={config.explore_on!r} with zero_optimization.stage={ds.stage}",
        "it keeps all micro-batches' gradients whole to the end of a step", "Use stage 2 or 3, or explore_on='batch'",
    ),
    _flag("zero_optimization.elastic_checkpoint", "it asks every block for the state of the first"),
    _flag("hybrid_engine.enabled", "it replaces the engine"),
    _flag("compile.deepcompile", "it compiles the gradients of all blocks in"),
    _refused(
        lambda ds, _: ds.value("managed_gradient_accumulation") is False,
        "managed_gradient_accumulation=false", "the window of a choice is DeepSpeed's own", "Set it to true",
    ),
    _refused(
        lambda ds, _: ds.value("checkpoint.writer") is not None,
        "checkpoint.writer", "what it writes is not there yet when a save returns", "Remove it",
    ),
    _flag("datastates_ckpt.enabled", "a save returns before it has written"),
    *(
        _flag(f"{key}.{key}_{name}", _NO_MASTERS)
        for key in ("bf16", "fp16")
        for name in ("master_weights_and_grads", "optimizer_states")
    ),
    _refused(
        lambda ds, _: ds.autocasts_to_fp16,
        lambda ds, _: f"torch_autocast.dtype={ds.autocast_dtype!r}",
        "its loss scaler would skip some blocks of a step only", "Use 'bfloat16', or the fp16 section",
    ),
    _refused(
        lambda ds, _: ds.precision == "bf16" and ds.accumulation_dtype == "fp32" and ds.stage == 1
        and not ds.offload_optimizer.is_on,
        "data_types.grad_accum_dtype='fp32' with bf16 and zero_optimization.stage=1",
        "DeepSpeed then uses its BF16_Optimizer (engine.py:2310)", "Use stage 2",
    ),
    _sparse_grad_on_nvme("offload_param", "its matrices are written after each update"),
    _sparse_grad_on_nvme("offload_optimizer", "entries that are chosen anew start with new states, not tested there"),
    _above("tensor_parallel.autotp_size", 1, _OTHER_RANKS, "Set it to 1"),
    _above("sequence_parallel_size", 1, _OTHER_RANKS, "Set it to 1"),
)  # fmt: skip


def optimizer_problem(ds_config: DsConfig) -> str | None:
    """Return the problem of the optimizer that ``ds_config`` names, or fails to name; None if it is supported."""
    name = ds_config.optimizer_type or ""
    if name.lower() in ADAM_NAMES:
        return None
    return (
        f"optimizer.type={name!r} can't be used with adagrad_select. Adam and AdamW are allowed, in the "
        "ds_config's optimizer section or as an object given to initialize."
    )


def _model_problems(model: nn.Module) -> list[str]:
    from deepspeed.moe.utils import has_moe_layers
    from deepspeed.runtime.pipe.module import PipelineModule

    name = type(model).__name__
    problems = []
    if isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
        problems.append(
            _refusal(
                f"model={name}, compiled as a whole,",
                "torch compiles it anew for each pattern of frozen blocks and goes back to eager after 8",
                "Give the model as it is, then call engine.compile(), which compiles layer by layer",
            )
        )
    if isinstance(model, PipelineModule):
        problems.append(_refusal(f"model={name}", "a pipeline stage sees only some blocks", "Use the plain module"))
    if has_moe_layers(model)[0]:
        what, why = f"model={name} with DeepSpeed MoE layers", "experts live on different ranks"
        problems.append(_refusal(what, why, "Use experts that are ordinary modules"))
    return problems
