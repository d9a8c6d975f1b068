"""LoRA (arXiv:2106.09685) by the package peft, under the ds_config's ZeRO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError

from .base import Option, RunContext, package
from .zero import Full

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TARGETS += ["qkv_proj", "gate_up_proj"]  # the same, where a model has them in one (Phi-3, Phi-4-mini)


class Lora(Full):
    """Adapters of ``rank`` on every projection, scaled by alpha / rank; they are merged into the saved model."""

    OPTIONS: ClassVar[Mapping[str, Option]] = {"rank": 256, "alpha": 512.0, "dropout": 0.0}

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if DsConfig.of(config).stage == 3:
            raise ConfigError("--method lora merges its adapters, which ZeRO stage=3 has in parts. Use stage 1 or 2.")
        return super().edit(config)

    def loading_dtype(self, config: Mapping[str, Any]) -> str:
        """Return fp32, in which adapters are drawn."""
        return "float32"

    def start(self, model: Any, context: RunContext) -> Any:
        peft = package("peft")
        adapters = peft.LoraConfig(
            r=self.options["rank"],
            lora_alpha=self.options["alpha"],
            lora_dropout=self.options["dropout"],
            target_modules=_TARGETS,
            task_type="CAUSAL_LM",
        )
        return super().start(peft.get_peft_model(model, adapters), context)

    def result(self) -> tuple[Any, Mapping[str, torch.Tensor] | None]:
        merged = self.engine.module.merge_and_unload()
        return merged, merged.state_dict() if self.engine.global_rank == 0 else None
