"""Combinations that can't work are refused with the setting, its value and the remedy, before DeepSpeed runs."""

from __future__ import annotations

import importlib.util

import pytest
from torch import nn

from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError
from ds_agsel.zero.support import missing_for_nvme, refuse_unsupported, unsupported

ZERO2 = {"zero_optimization": {"stage": 2}}


def test_eight_bits_need_bitsandbytes(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )
    (said,) = unsupported(DsConfig.of(ZERO2), SelectionConfig(state_dtype="int8"))
    assert said.startswith("adagrad_select.state_dtype='int8' needs bitsandbytes, which is not installed.")
    assert "pip install 'ds-agsel[lowbit]'" in said


NVME = {"device": "nvme", "nvme_path": "/somewhere"}
BF16_ZERO1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def zero2(**settings):
    return {"zero_optimization": {"stage": 2, **settings}}


def zero3(**settings):
    return {"zero_optimization": {"stage": 3, **settings}}


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({}, r"zero_optimization\.stage=0 can't be used.*Stages 1, 2 and 3 are allowed: use 1"),
        (zero3(offload_optimizer={"device": "nvme"}), r"offload_optimizer\.device='nvme' needs .*nvme_path.*Set it"),
        (zero3(offload_param={"device": "nvme"}), r"offload_param\.device='nvme' needs .*nvme_path.*Set it"),
        (zero3(offload_param={"device": "disk"}), r"offload_param\.device='disk' is unknown. Use none, cpu or nvme"),
        (zero3(offload_param=NVME), r"device='nvme' with .*stage3_prefetch_bucket_size.*to 0"),
        (zero3(offload_param=NVME, stage3_prefetch_bucket_size=0), r"device='nvme' without bf16.*bf16\.enabled"),
        (zero3(mics_shard_size=2), r"mics_shard_size=2.*Leave it out"),
        (zero3(zero_hpz_partition_size=2), r"zero_hpz_partition_size=2.*Set it to 1"),
        (zero3(zero_quantized_weights=True), "zero_quantized_weights=true.*Set it to false"),
        (zero3(zero_quantized_gradients=True), "zero_quantized_gradients=true.*Set it to false"),
        (zero3(zero_quantized_nontrainable_weights=True), "zero_quantized_nontrainable_weights=true"),
        (zero3(offload_optimizer={"device": "cpu", "ratio": 0.5}), r"ratio=0\.5.*Set it to 1\.0"),
        (zero2(zenflow={"topk_ratio": 0.1}), "zenflow can't be used.*Remove one of the two sections"),
        (zero2(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload=true.*Set it to false"),
        (zero2(offload_optimizer={"device": "nvme"}), r"device='nvme' with .*stage=2.*Use stage 3"),
        (zero2(offload_optimizer={"device": "cpu", "ratio": 0.5}), r"ratio=0\.5.*Set it to 1\.0"),
        (zero2(elastic_checkpoint=True), "elastic_checkpoint=true.*Set it to false"),
        ({**ZERO2, "hybrid_engine": {"enabled": True}}, r"hybrid_engine\.enabled=true"),
        ({**ZERO2, "compile": {"deepcompile": True}}, r"compile\.deepcompile=true"),
        ({**ZERO2, "managed_gradient_accumulation": False}, "managed_gradient_accumulation=false.*Set it to true"),
        ({**ZERO2, "checkpoint": {"writer": {"type": "FAST"}}}, r"checkpoint\.writer can't be used.*Remove it"),
        ({**ZERO2, "datastates_ckpt": {"enabled": True}}, r"datastates_ckpt\.enabled=true.*Set it to false"),
        ({**ZERO2, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "without fp32 masters"),
        ({**ZERO2, "torch_autocast": {"enabled": True, "dtype": "float16"}}, r"torch_autocast\.dtype='float16'"),
        ({**BF16_ZERO1, "data_types": {"grad_accum_dtype": "fp32"}}, "BF16_Optimizer.*Use stage 2"),
        ({**ZERO2, "tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel\.autotp_size=2.*Set it to 1"),
        ({**ZERO2, "sequence_parallel_size": 2}, "sequence_parallel_size=2.*Set it to 1"),
    ],
)
def test_refused(ds_config, message):
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(DsConfig.of(ds_config), nn.Linear(1, 1), None, SelectionConfig())


def test_host_step_without_offload_is_refused():
    with pytest.raises(ConfigError, match=r"step_device='cpu' and .*device='none' contradict"):
        refuse_unsupported(DsConfig.of(ZERO2), nn.Linear(1, 1), None, SelectionConfig(step_device="cpu"))


@pytest.mark.parametrize("stage", [2, 3])
def test_stepping_on_the_accelerator_with_offload_is_refused(stage):
    offload = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r"step_device='accelerator' and .*device='cpu' contradict"):
        refuse_unsupported(DsConfig.of(offload), nn.Linear(1, 1), None, SelectionConfig(step_device="accelerator"))


def test_exploring_on_the_first_micro_batch_needs_stage_2():
    with pytest.raises(ConfigError, match=r"explore_on='first_micro_batch' with zero_optimization.stage=1"):
        refuse_unsupported(
            DsConfig.of({"zero_optimization": {"stage": 1}}),
            nn.Linear(1, 1),
            None,
            SelectionConfig(explore_on="first_micro_batch"),
        )


@pytest.mark.parametrize(
    ("ds_config", "section", "said"),
    [
        ({}, {}, "fp32 model weights"),
        ({"fp16": {"enabled": True}}, {}, "fp16 model weights"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, {}, "torch_autocast"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {},
         "zero_optimization.offload_param.device='cpu'"),
        ({"bf16": {"enabled": True}}, {"sparse_grad": {}}, "adagrad_select.sparse_grad"),
    ],
)  # fmt: skip
def test_split_master_weights_are_refused_by_name(ds_config, section, said):
    config = SelectionConfig(master_weights="split", **section)
    (problem,) = unsupported(DsConfig.of({**ZERO2, **ds_config}), config)
    assert problem.startswith(f"adagrad_select.master_weights='split' can't be used with {said}")
    assert "fp32'" in problem


def test_split_master_weights_are_possible_with_bf16():
    for stage, device in ((1, "none"), (2, "cpu"), (3, "cpu"), (3, "nvme")):
        zero = {"stage": stage, "offload_optimizer": {"device": device, "nvme_path": "/here"}}
        ds_config = DsConfig.of({"bf16": {"enabled": True}, "zero_optimization": zero})
        for fields in ({}, {"state_dtype": "bf16"}, {"on_reentry": "reset"}, {"on_reentry": "decay"}):
            assert not unsupported(ds_config, SelectionConfig(master_weights="split", **fields))


def test_a_model_parallel_unit_is_refused():
    with pytest.raises(ConfigError, match=r"initialize\(mpu=\.\.\.\).*Leave mpu out"):
        refuse_unsupported(DsConfig.of(ZERO2), nn.Linear(1, 1), object(), SelectionConfig())


def test_a_pipeline_is_refused():
    from deepspeed.runtime.pipe.module import PipelineModule

    model = PipelineModule.__new__(PipelineModule)  # its constructor wants as many ranks as stages
    nn.Module.__init__(model)
    with pytest.raises(ConfigError, match=r"model=PipelineModule can't be used.*Use the plain module"):
        refuse_unsupported(DsConfig.of(ZERO2), model, None, SelectionConfig())


def test_deepspeeds_experts_are_refused():
    from deepspeed.moe.layer import MoE

    model = nn.Sequential(MoE(4, nn.Linear(4, 4), num_experts=2))
    with pytest.raises(ConfigError, match=r"with DeepSpeed MoE layers can't be used.*ordinary modules"):
        refuse_unsupported(DsConfig.of(ZERO2), model, None, SelectionConfig())


def test_what_the_machine_lacks_for_nvme_is_named_before_deepspeed_runs(tmp_path, monkeypatch):
    from ds_agsel.zero import compat

    offload = {"device": "nvme", "nvme_path": str(tmp_path / "new" / "folder")}
    ds_config = zero3(offload_optimizer=offload)
    monkeypatch.setattr(compat, "can_swap", lambda: True)
    assert missing_for_nvme(DsConfig.of(zero3(offload_optimizer={"device": "cpu"}))) == []
    monkeypatch.setattr(compat, "can_swap", lambda: False)
    with pytest.raises(ConfigError, match=r"device='nvme' needs .*libaio.*apt-get install libaio-dev"):
        refuse_unsupported(DsConfig.of(ds_config), nn.Linear(1, 1), None, SelectionConfig())
    offload["nvme_path"] = "/proc/nothing"
    monkeypatch.setattr(compat, "can_swap", lambda: True)
    with pytest.raises(ConfigError, match=r"nvme_path='/proc/nothing' can't be used: .*Name a folder on a local disk"):
        refuse_unsupported(DsConfig.of(ds_config), nn.Linear(1, 1), None, SelectionConfig())
