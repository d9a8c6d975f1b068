"""ZenFlow (arXiv:2505.12242), DeepSpeed's own, by its section of the ds_config."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import psutil

from ds_agsel.ds_config import with_offload_to_cpu, with_zero
from ds_agsel.zero.storage import storage_bytes

from .base import Option
from .tensors import held_by
from .zero import Full


class ZenFlow(Full):
    """Top-k gradient columns at each step, the rest on the host every ``update_interval`` steps."""

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "topk_ratio": 0.1, "update_interval": 4, "select_interval": 16, "full_warm_up_rounds": 0, "overlap_step": 0,
    }  # fmt: skip

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        section = {**self.options, "select_strategy": "step", "overlap_step": bool(self.options["overlap_step"])}
        return with_zero(with_offload_to_cpu(super().edit(config)), zenflow=section)

    def state_bytes(self) -> int:
        selective = self.engine.optimizer.selective_optimizer
        return super().state_bytes() + storage_bytes(held_by(selective.state.values()))

    def processor_seconds(self) -> float:
        """Add the time of the process that steps on the host with overlap_step."""
        spent = [child.cpu_times() for child in psutil.Process().children()]
        return time.process_time() + sum(times.user + times.system for times in spent)
