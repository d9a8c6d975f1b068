"""`ds-agsel check` names what DeepSpeed stops at: its own parser reads the ds_config, without a process group."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ds_agsel.entry.check import problems_of

SOUND: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "adagrad_select": {"select_percent": 34},
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto"},
        {"train_batch_size": 64, "gradient_accumulation_steps": 4},
        {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}},
        {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto", "offload_param": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}},
        {"scheduler": {"type": "OneCycleLR", "params": {}}},
        {"prescale_gradients": True, "zero_optimization": {"stage": 2, "reduce_scatter": False}},
    ],
    ids=str,
)
def test_what_deepspeed_takes_is_sound(extra: dict[str, Any]) -> None:
    assert problems_of({**SOUND, **extra}) == []


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"compile": {"disable": False}}, "disable=False is refused by DeepSpeed (CompileConfig): Extra inputs"),
        ({"amp": {"enabled": False}}, "DeepSpeed refuses this ds_config: NVIDIA Apex AMP integration has been removed"),
        ({"elasticity": {"enabled": False}}, "DeepSpeed refuses this ds_config: Elastic training has been removed"),
        ({"sparse_gradients": True}, "DeepSpeed refuses this ds_config: Sparse compression"),
        ({"prescale_gradients": True}, "prescale_gradients=true with zero_optimization.reduce_scatter=true"),
        ({"curriculum_learning": {"enabled": True}}, "Legacy top-level 'curriculum_learning' has been removed"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16 and fp16 modes cannot be simultaneously"),
        ({"train_batch_size": 7}, "train_batch_size=7 is no multiple of train_micro_batch_size_per_gpu=2 × "),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0 is not a whole number"),
        ({"scheduler": {"type": "Cosine", "params": {}}}, "scheduler.type='Cosine' is refused by DeepSpeed"),
        ({"bf16": {"enable": True}}, "enable=True is refused by DeepSpeed (DeepSpeedBF16Config)"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com=True is refused"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_params": True}}, "cpu_offload_params=True is refused"),
        ({"bf16": 3}, "DeepSpeed refuses this ds_config"),
    ],
    ids=str,
)
def test_what_deepspeed_stops_at_is_passed_on_once(extra: dict[str, Any], problem: str) -> None:
    found = problems_of({**SOUND, **extra})
    assert len(found) == 1 and problem in found[0], found


def test_a_fraction_is_warned_of_without_a_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        assert problems_of({**SOUND, "adagrad_select": {"select_percent": 0.2}}) == []
    assert "for 0.2 of the blocks set it to 20" in caplog.text
