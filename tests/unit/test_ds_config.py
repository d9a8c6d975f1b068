"""The ds_config as it is read here, compared with what DeepSpeed's own parser makes of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils.config import get_timers_config

from ds_agsel import ds_config as edits
from ds_agsel.ds_config import DsConfig, read_ds_config
from ds_agsel.errors import ConfigError

ZERO_SECTIONS: list[dict[str, Any]] = [
    {},
    {"stage": 1},
    {"stage": "2"},
    {"stage": 3.0},
    {"stage": 3, "offload_optimizer": {"device": OffloadDeviceEnum.cpu}},
    {"stage": 3, "offload_param": {"device": OffloadDeviceEnum.nvme, "nvme_path": "/x", "buffer_count": "auto"}},
    {"stage": 2, "cpu_offload": True},
    {"stage": 2, "cpu_offload": False},
    {"stage": 3, "cpu_offload": True, "cpu_offload_param": True},
    {"stage": 2, "offload_optimizer": {"device": "auto"}},
    {"stage": 2, "offload_optimizer": "auto"},
    {"stage": 2, "offload_optimizer": None},
    {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": "true"},
    {"stage": 2, "reduce_bucket_size": "auto", "contiguous_gradients": False},
    {"stage": 3, "max_live_parameters": 7, "prefetch_bucket_size": 0},
    {"stage": 3, "stage3_max_live_parameters": "auto", "stage3_param_persistence_threshold": 9},
    {"stage": 3, "param_persistence_threshold": 9, "sub_group_size": 0, "overlap_comm": "auto"},
    {"stage": 1, "round_robin_gradients": 1, "parameter_alignment": True},
]


@pytest.mark.parametrize("section", ZERO_SECTIONS, ids=str)
def test_the_zero_section_says_what_deepspeed_parses(section: dict[str, Any]) -> None:
    before = copy.deepcopy(section)
    ours, theirs = DsConfig.of({"zero_optimization": section}), DeepSpeedZeroConfig(**section)
    assert section == before
    assert ours.stage == theirs.stage
    for offload, name in ((ours.offload_optimizer, "offload_optimizer"), (ours.offload_param, "offload_param")):
        parsed = getattr(theirs, name)
        assert offload.device == ("none" if parsed is None else parsed.device)
        assert parsed is None or offload.buffer_count == parsed.buffer_count
    assert ours.reduce_bucket_numel == theirs.reduce_bucket_size
    assert ours.sub_group_numel == theirs.sub_group_size
    assert ours.persistence_threshold_numel == theirs.param_persistence_threshold
    assert ours.max_live_numel == theirs.max_live_parameters
    assert ours.prefetch_bucket_numel in (None, theirs.prefetch_bucket_size)
    for name in ("overlap_comm", "contiguous_gradients", "round_robin_gradients", "parameter_alignment"):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.require_readable()


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": "true"}}, "bf16"),
        ({"bf16": {}}, "fp32"),
        ({"bf16": {"enabled": False}, "bfloat16": {"enabled": True}}, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_precision_is_deepspeeds(settings: dict[str, Any], precision: str) -> None:
    parsed = DeepSpeedConfig({"train_batch_size": 1, **settings})
    theirs = "bf16" if parsed.bfloat16_config.enabled else "fp16" if parsed.float16_config.enabled else "fp32"
    assert DsConfig.of(settings).precision == theirs == precision
    assert DsConfig.of({**settings, "torch_autocast": {"enabled": True}}).arithmetic == (
        precision if precision != "fp32" else "autocast bfloat16"
    )


def test_autos_are_named_as_the_user_spelt_them() -> None:
    read = DsConfig.of({"zero_optimization": {"max_live_parameters": "auto"}, "bfloat16": {"enabled": "auto"}})
    assert read.autos == ("zero_optimization.max_live_parameters", "bfloat16.enabled")
    assert read.bf16_is_auto and not read.is_half


def test_a_value_of_the_wrong_kind_is_the_default_and_is_named() -> None:
    read = DsConfig.of({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}, "train_batch_size": 0})
    assert read.reduce_bucket_numel == 500_000_000 and read.train_batch_size is None
    read.require_readable("zero_optimization.stage")
    with pytest.raises(ConfigError, match="train_batch_size=0 is not a whole number from 1 on"):
        read.require_readable("train_batch_size")
    with pytest.raises(ConfigError, match="train_batch_size=0"):
        read.require_readable()


EDITS: dict[str, Any] = {
    "with_zero": lambda raw: edits.with_zero(raw, stage=1),
    "with_offload_to_cpu": edits.with_offload_to_cpu,
    "without_pipelined_swapping": edits.without_pipelined_swapping,
    "with_torch_adam": edits.with_torch_adam,
    "without_optimizer": edits.without_optimizer,
    "with_learning_rate": lambda raw: edits.with_learning_rate(raw, 1.0),
    "with_scheduler_params": lambda raw: edits.with_scheduler_params(raw, total_num_steps=3),
    "with_scheduler_for_groups": lambda raw: edits.with_scheduler_for_groups(raw, 2, (0, 0, 1)),
    "with_bf16": lambda raw: edits.with_bf16(raw, True),
    "with_batch": lambda raw: edits.with_batch(raw, 3, 2),
    "without_autos": edits.without_autos,
}


def full(device: str) -> dict[str, Any]:
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1.0, 2.0], "warmup_min_lr": 0}},
        "bfloat16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": device, "nvme_path": "/x"}},
    }


@pytest.mark.parametrize("device", ["none", "nvme"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_leaves_the_callers_mapping_alone(name: str, device: str) -> None:
    raw = full(device)
    result = EDITS[name](raw)
    assert raw == full(device)
    changed = result != raw
    assert changed or name in ("with_offload_to_cpu", "without_pipelined_swapping")


def test_what_the_edits_make() -> None:
    assert DsConfig.of(EDITS["with_bf16"](full("none"))).precision == "bf16"
    assert DsConfig.of(EDITS["with_batch"](full("none"))).train_batch_size is None
    assert DsConfig.of(EDITS["with_offload_to_cpu"](full("none"))).offload_optimizer.device == "cpu"
    assert DsConfig.of(EDITS["with_offload_to_cpu"](full("nvme"))).offload_optimizer.device == "nvme"
    assert EDITS["with_scheduler_for_groups"](full("none"))["scheduler"]["params"] == {
        "warmup_max_lr": [1.0, 1.0, 2.0],
        "warmup_min_lr": 0,
    }


@pytest.mark.parametrize("zero", [True, {"stage": 2, "cpu_offload": False}, {"stage": 2, "cpu_offload": True}])
def test_old_forms_can_be_moved_to_the_host(zero: Any) -> None:
    edited = edits.with_offload_to_cpu({"zero_optimization": zero})
    assert DsConfig.of(edited).offload_optimizer.device == "cpu"
    assert DeepSpeedZeroConfig(**edited["zero_optimization"]).offload_optimizer.device == "cpu"


COMMENTED = """{
  // a comment, as in DeepSpeedExamples' annotated configs
  "train_micro_batch_size_per_gpu": 2, # and another
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-3,},},
  /* one
     more */
  "zero_optimization": {"stage": 2},
}
"""


def test_a_file_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "commented.json"
    file.write_text(COMMENTED)
    assert read_ds_config(file) == DeepSpeedConfig(str(file))._param_dict


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read as a ds_config: No such file"),
        ('{"optimizer": {}, "optimizer": {}}', 'the key "optimizer" stands in it twice'),
        ('{"a": {"b": 1, "b": 2}}', 'the key "b" stands in it twice'),
        ("[1]", "and not an object"),
        ("{", "can't be read as a ds_config"),
        ('{"a":' * 100_000, "can't be read as a ds_config"),
    ],
    ids=["none", "twice", "twice inside", "list", "cut", "deep"],
)
def test_what_is_no_ds_config_is_refused_with_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        read_ds_config(file)
    assert "file.json" in str(raised.value)


TIMERS: list[dict[str, Any]] = [
    {},
    {"timers": {}},
    {"timers": {"throughput": {"enabled": False}}},
    {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
    {"timers": {"throughput": {"synchronized": True}}},
]


@pytest.mark.parametrize("raw", TIMERS, ids=str)
def test_the_timer_is_deepspeeds_and_is_changed_only_where_nothing_is_said(raw: dict[str, Any]) -> None:
    theirs = get_timers_config(raw)
    assert DsConfig.of(raw).timer_synchronizes == (theirs.enabled and theirs.synchronized)
    before, changed = copy.deepcopy(raw), edits.without_synchronizing_timer(raw)
    assert raw == before
    said = "throughput" in raw.get("timers", {})
    assert changed == (raw if said else {**raw, "timers": {"throughput": {"synchronized": False}}})
    assert get_timers_config(changed).synchronized == (theirs.synchronized and said)
