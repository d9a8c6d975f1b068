"""DeepSpeed's Adam optimizers: their states, their compiled ops."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from ds_agsel.zero.compat.versions import until

logger = logging.getLogger("ds_agsel")


def new_adam_state(optimizer: torch.optim.Optimizer, partition: torch.Tensor) -> dict[str, Any]:
    """Return a state for ``partition`` as ``optimizer`` makes it at its first update: zeros, step 0."""
    return {
        "step": adam_step(optimizer, 0),
        "exp_avg": torch.zeros_like(partition, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(partition, requires_grad=False),
    }


def adam_step(
    optimizer: torch.optim.Optimizer,
    count: int,
    param_group: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> int | torch.Tensor:
    """Return a step count as ``optimizer`` keeps it: an int for DeepSpeed's, fp32 of no dimension for torch's.

    On the host; on ``device`` if ``param_group`` is given and asks for torch's fused or capturable form.
    """
    if isinstance(optimizer, (DeepSpeedCPUAdam, FusedAdam)):
        return count
    on_device = param_group is not None and (param_group.get("fused") or param_group.get("capturable"))
    return torch.tensor(float(count), dtype=torch.float32, device=device if on_device else None)


def has_fused_adam() -> bool:
    """Return whether DeepSpeed's FusedAdam can be made for this accelerator: its op loads, built now if need be.

    Builders report themselves compatible without nvcc, without ninja and on a CPU that has no such op: only loading
    tells. Logs a warning with the reason if that fails. Local to this rank.
    """
    builder = get_accelerator().create_op_builder("FusedAdamBuilder")
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":
        return False
    try:
        with architectures_by_number():
            builder.load(verbose=False)
    except Exception as error:  # compiler, ninja, nvcc and loader each raise errors of their own
        logger.warning(
            "adagrad_select: DeepSpeed's FusedAdam can't be built here (%s: %s); torch's AdamW is used instead. "
            "To have it, install the CUDA toolkit of torch.version.cuda, with nvcc, and ninja.",
            type(error).__name__,
            error,
        )
        return False
    return True


@contextmanager
def architectures_by_number() -> Iterator[None]:
    """Inside, `TORCH_CUDA_ARCH_LIST` has 9.0 for 9.0a: DeepSpeed 0.19.8 reads numbers (op_builder/builder.py:710).

    NVIDIA's images set it so. An op that is loaded once is not built again, so that DeepSpeed finds it later.
    """
    name = "TORCH_CUDA_ARCH_LIST"
    before = os.environ.get(name)
    if before is None:
        yield
        return
    os.environ[name] = re.sub(r"(?<=\d)[a-z]+", "", before)
    try:
        yield
    finally:
        os.environ[name] = before


def cpu_adam_op(optimizer: torch.optim.Optimizer) -> Any:
    """Return DeepSpeed's compiled `cpu_adam` module (csrc/adam/cpu_adam.cpp), built on first use."""
    return optimizer.ds_opt_adam if isinstance(optimizer, DeepSpeedCPUAdam) else CPUAdamBuilder().load()


def new_cpu_adam_id() -> int:
    """Return a C++ optimizer id that no `DeepSpeedCPUAdam` of this process uses (ops/adam/cpu_adam.py)."""
    identifier = DeepSpeedCPUAdam.optimizer_id
    DeepSpeedCPUAdam.optimizer_id += 1
    return identifier


def takes_powers_anew() -> bool:
    """Return whether a C++ Adam object that steps several groups takes powers of β anew, for all but the first of them.

    Until 0.18.9 (csrc/includes/cpu_adam.h:57) a call that repeats the last step count does, and the call after it
    multiplies them by β once: the first group's powers are those of the step before times β. From 0.19.0 on, all
    groups share a running product.
    """
    return until("0.18.9")


def share_fused_steps(optimizer: FusedAdam, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Count the last step of ``param_groups`` for all of their parameters.

    `FusedAdam.step` counts it for the last parameter of each group alone (ops/adam/fused_adam.py:192), and reads it
    there.
    """
    for group in param_groups:
        count = optimizer.state[group["params"][-1]]["step"]
        for param in group["params"]:
            optimizer.state[param]["step"] = count
