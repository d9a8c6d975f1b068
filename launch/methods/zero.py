"""DeepSpeed's ZeRO, with AdaGradSelect and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import ds_agsel
from ds_agsel.config import SECTION
from ds_agsel.ds_config import DsConfig, with_offload_to_cpu
from ds_agsel.gast_section import GAST
from ds_agsel.sparse.targets import is_carrier, weight_of
from ds_agsel.zero import compat
from ds_agsel.zero.adapters import adapter_for
from ds_agsel.zero.selective import SelectiveStep
from ds_agsel.zero.states.split import SplitStates
from ds_agsel.zero.storage import storage_bytes

from .base import Method, RunContext, without_section
from .tensors import held_by


class Zero(Method):
    """An engine of DeepSpeed, as the ds_config defines it."""

    def start(self, model: Any, context: RunContext) -> Any:
        self.engine = self._initialize(model, context.config, **context.support)
        self.selection = getattr(self.engine, "selection", None)
        self._wanted_accumulation = DsConfig.of(context.config).accumulation_steps
        return self.engine

    def loading_dtype(self, config: Mapping[str, Any]) -> str:
        """Return bf16 where the engine makes it of the weights anyway: master weights are copies of those.

        Read in fp32 they would take 4 bytes a parameter and rank for a moment, more than anything later on the host.
        """
        return "bfloat16" if DsConfig.of(config).precision == "bf16" else "float32"

    def _initialize(self, model: Any, config: dict[str, Any], **more: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = ds_agsel.initialize(model=model, model_parameters=trained, config=config, **more)
        return engine

    def trained(self) -> frozenset[str] | None:
        if self.selection is None or not self.selection.history:
            return None
        blocks = self.selection.blocks
        chosen = self.selection.history[-1].blocks
        names = frozenset(name for index in chosen for name in blocks[index].parameter_names)
        return names | {weight_of(name) for name in names if is_carrier(name)}  # which follow their entries

    def gradient_bytes(self) -> int:
        optimizer = self.engine.optimizer
        if not isinstance(optimizer, compat.ZeROOptimizer):  # stage 0
            return storage_bytes([p.grad for p in self.engine.module.parameters()])
        return sum(adapter_for(optimizer).held_gradient_bytes(optimizer))

    def state_bytes(self) -> int:
        optimizer = self.engine.optimizer
        if isinstance(optimizer, SelectiveStep) and optimizer.home.are_temporary:
            return optimizer.state_bytes()  # what DeepSpeed sees of them has no storage
        return storage_bytes(held_by(getattr(optimizer, "optimizer", optimizer).state.values()))

    def master_bytes(self) -> int:
        optimizer = self.engine.optimizer
        if isinstance(optimizer, SelectiveStep) and isinstance(optimizer.home, SplitStates):
            return optimizer.home.master_bytes()
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(optimizer, name):
                return storage_bytes(list(getattr(optimizer, name)))
        return 0

    def faults(self) -> list[str]:
        has = self.engine.gradient_accumulation_steps()
        if has == self._wanted_accumulation:
            return []
        return [f"gradient_accumulation_steps became {has}, where the ds_config says {self._wanted_accumulation}."]


class AdaGradSelect(Zero):
    """ZeRO with the ds_config's section, or with the section's defaults if it has none."""

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**config, SECTION: {**config.get(SECTION, {}), "enabled": True}}


class Gast(Zero):
    """GAST alone: every block is updated, each by the rows that it takes. ``rows`` 0: half of the micro-batch."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {"draw": "sample", "rows": 0}

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        gast = {"draw": self.options["draw"], "select_samples": self.options["rows"] or None}
        return {**config, SECTION: {"policy": "all", GAST: gast}}


class Full(Zero):
    """Plain DeepSpeed: the ds_config without the section."""

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return without_section(config)


class Offload(Full):
    """Plain ZeRO-Offload: optimizer states on the host, which does AdamW."""

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_offload_to_cpu(super().edit(config))
