"""Choose where AdamW runs: by the section and the ds_config or, if they leave it open, by what fits."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_agsel import processor
from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.lottery import Bound
from ds_agsel.residency import default_budget_bytes
from ds_agsel.zero.states.forms import FORMS

logger = logging.getLogger("ds_agsel")

_FP32_STATE_BYTES = 12  # an element's master weight and two moments
_RATE_SAMPLE_BYTES = 64 * 2**20


class StepDevice(enum.Enum):
    """Where the update runs, and where its states are.

    HOST: ZeRO-Offload: states in host memory, AdamW on the processor.
    VISIT: states in pinned host memory; the selected blocks' are on the accelerator when AdamW runs there.
    STAY: states where the model is. For accelerators without memory of their own: the CPU.
    """

    HOST = "host"
    VISIT = "visit"
    STAY = "stay"


@dataclass(frozen=True)
class Situation:
    """The inputs of the decision. Bytes are of one rank.

    Attributes:
        offloads: the ds_config says ``offload_optimizer``, to the cpu or (ZeRO-3) to NVMe.
        can_offload: the optimizer comes from the ds_config, so that DeepSpeed can make the one that offload needs.
        has_own_memory: the accelerator's memory is not the host's.
    """

    offloads: bool
    can_offload: bool
    has_own_memory: bool
    needed_bytes: int
    available_bytes: int


def decide(wanted: str | None, now: Situation) -> tuple[StepDevice, str]:
    """Return where to step, and why. Contradictions to ``offload_optimizer`` have been refused before (`support`)."""
    if wanted == "accelerator":
        return StepDevice.VISIT, "step_device is 'accelerator'"
    if now.offloads:
        return StepDevice.HOST, "offload_optimizer says so"
    if not now.has_own_memory:
        return StepDevice.STAY, "the accelerator is the processor: states are in host memory as it is"
    if now.needed_bytes > now.available_bytes and now.can_offload:
        return StepDevice.HOST, (
            f"weights, gradients and visiting states need {now.needed_bytes} bytes of the accelerator, and "
            f"{now.available_bytes} are free"
        )
    return StepDevice.VISIT, (
        f"weights, gradients and visiting states need {now.needed_bytes} bytes of the accelerator, of which "
        f"{now.available_bytes} are free"
    )


def situation(
    ds_config: DsConfig,
    config: SelectionConfig,
    blocks: Sequence[Block],
    selectable: Sequence[int],
    bound: Bound,
    optimizer_is_given: bool,
) -> Situation:
    """Return what `decide` needs to know of this run on this machine now; memory is that of the rank with the least.

    Collective.
    """
    ranks = dist.get_world_size()
    state_bytes = {index: _state_bytes(config, blocks[index].numel // ranks) for index in selectable}
    needed = _weight_and_gradient_bytes(ds_config, sum(block.numel for block in blocks), ranks)
    budget = config.state_budget_bytes or default_budget_bytes(state_bytes, bound)
    needed += min(budget, sum(state_bytes.values()))
    if config.state_dtype != "fp32" or config.master_weights != "fp32":  # one block's are fp32 for its update
        needed += _FP32_STATE_BYTES * max(blocks[index].numel for index in selectable) // ranks
    accelerator = get_accelerator()
    own_memory = accelerator.device_name() != "cpu"
    return Situation(
        offloads=ds_config.offload_optimizer.is_on,
        can_offload=not optimizer_is_given,
        has_own_memory=own_memory,
        needed_bytes=needed,
        available_bytes=_least_available_bytes() if own_memory else 0,
    )


def _state_bytes(config: SelectionConfig, numel: int) -> int:
    """Return the bytes in which the states of ``numel`` elements visit the accelerator, master weights included."""
    moments = FORMS[config.state_dtype].rooms(numel).values()
    master = 2 if config.master_weights == "split" else 4
    return numel * master + sum(elements * dtype.itemsize for elements, dtype in moments)


def _weight_and_gradient_bytes(ds_config: DsConfig, numel: int, ranks: int) -> int:
    """Return what a model of ``numel`` elements takes at an explore step that does not stream, without its states."""
    held = 2 * numel  # weights and gradients
    if ds_config.stage == 3:
        gathered = min(numel, ds_config.max_live_numel)
        partition = numel // ranks
        held = gathered + (partition if ds_config.offload_param.is_on else 2 * partition)
    return held * (2 if ds_config.is_half else 4)


def _least_available_bytes() -> int:
    accelerator = get_accelerator()
    device = accelerator.current_device_name()
    available = torch.tensor(accelerator.available_memory(), dtype=torch.int64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(available, op=dist.ReduceOp.MIN)
    return int(available.item())


def report(choice: StepDevice, reason: str) -> None:
    """Log the choice, its reason and what its speed depends on: once, on rank 0, if logging is on."""
    if dist.get_rank() != 0 or not logger.isEnabledFor(logging.INFO):
        return
    where = {StepDevice.HOST: "on the host", StepDevice.VISIT: "on the accelerator, its states visit it"}
    logger.info(
        "adagrad_select: AdamW runs %s: %s. Processor: %s, SIMD %s. %s",
        where.get(choice, "where the model is"), reason, processor.describe()["name"], processor.describe()["simd"],
        _copy_rate() if choice is not StepDevice.STAY else "No copies between host and accelerator.",
    )  # fmt: skip


def _copy_rate() -> str:
    """Return the measured rate of one pinned copy H2D."""
    accelerator = get_accelerator()
    host = torch.empty(_RATE_SAMPLE_BYTES, dtype=torch.uint8)
    if not accelerator.is_synchronized_device():
        host = accelerator.pin_memory(host)
    device = torch.empty_like(host, device=accelerator.current_device_name())
    device.copy_(host)
    accelerator.synchronize()
    start = time.perf_counter()
    device.copy_(host, non_blocking=True)
    accelerator.synchronize()
    seconds = time.perf_counter() - start
    return f"Pinned copies: {_RATE_SAMPLE_BYTES / seconds / 1e9:.1f} GB/s."
