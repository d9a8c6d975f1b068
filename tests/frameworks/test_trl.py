"""TRL's trainers and LoRA with `ds_agsel.install()`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trainers
from support import assert_identical
from trainers import SECTION, assert_engaged, ds_config, forget_accelerate, outcome, tiny_llama

import ds_agsel
from ds_agsel.report.runs import read_run

pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
START = {name: parameter.detach().clone() for name, parameter in tiny_llama().named_parameters()}


def train(folder: Path, kind: str, offload: str, lora: bool = False, **fields: Any) -> dict[str, Any]:
    """An SFTTrainer's or DPOTrainer's run on sums. ``fields`` are the section's, beside those of every test."""
    sys.path.insert(0, str(ROOT / "launch" / "examples"))
    import tiny
    import trl
    from peft import LoraConfig

    forget_accelerate()
    section = {**SECTION, "never_select": ["base_model.model.model.layers.1"]} if lora else {**SECTION, **fields}
    settings = vars(trainers.arguments(folder, None))
    kept = ("output_dir", "num_train_epochs", "learning_rate", "logging_steps", "save_strategy", "use_cpu")
    config_class = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[kind]
    arguments = config_class(
        **{name: settings[name] for name in kept},
        deepspeed=ds_config(offload=offload, section=section),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_length=32,
        bf16=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # older TRL turns checkpointing on, reentrant
        report_to=[],
    )
    answers = {"sft": ("completion",), "dpo": ("chosen", "rejected")}[kind]

    def row(a: int, b: int) -> dict[str, str]:
        return {"prompt": f"{a} + {b} =", **{name: f" {a + b - i}" for i, name in enumerate(answers)}}

    more: dict[str, Any] = {"ref_model": tiny_llama()} if kind == "dpo" else {}
    if lora:
        more = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "up_proj"])}
    with ds_agsel.installed():
        trainer = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}[kind](
            model=tiny_llama(),
            args=arguments,
            train_dataset=tiny.rows(None, row).select(range(24)),
            processing_class=tiny.model_and_tokenizer(None)[1],
            callbacks=[trainers.SelectionCallback()],
            **more,
        )
        before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
        trainer.train()
    result = outcome(trainer) | {"before": before}
    if kind == "dpo":
        result["reference"] = {
            name.removeprefix("module."): tensor.detach() for name, tensor in trainer.ref_model.named_parameters()
        }
    return result


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_selects(workers, tmp_path, kind, offload, ranks):
    for run in workers(ranks).run(train, tmp_path, kind, offload):
        assert_engaged(run, START)
        assert run["steps_per_epoch"] * 2 == run["max_steps"]
        losses = [line["loss"] for line in run["logs"] if "loss" in line]
        assert losses[-1] < losses[0]
        if kind == "dpo":  # the reference model, whose engine has our section and no optimizer, stays as it was
            assert_identical(START, run["reference"])


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_blocks_learn_from_some_rows_without_user_code(workers, tmp_path, kind):
    [run] = workers(1).run(train, tmp_path, kind, "none", gast={})
    assert_engaged(run, START)
    choices = read_run(tmp_path).choices
    assert choices and all(len(choice.taken) == (choice.rows + 1) // 2 for choice in choices)


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_adapters(workers, tmp_path, ranks):
    """With LoRA a block is what a layer has of trainable parameters: its adapters. The base never moves."""
    pytest.importorskip("peft")
    never = "base_model.model.model.layers.1"
    for run in workers(ranks).run(train, tmp_path, "sft", "none", lora=True):
        assert list(run["blocks"]) == [f"base_model.model.model.layers.{layer}" for layer in range(3)]
        assert all("lora_" in name for names in run["blocks"].values() for name in names)
        assert run["counts"][list(run["blocks"]).index(never)] == 0
        assert len(run["history"]) == run["global_step"] == sum(run["counts"])
        in_blocks = {name: index for index, names in enumerate(run["blocks"].values()) for name in names}
        for name, tensor in run["weights"].items():
            moved = not (tensor == run["before"][name]).all()
            first = 2 if "lora_A" in name else 1  # B starts at 0, so that A's first gradient is 0
            assert moved == (name in in_blocks and run["counts"][in_blocks[name]] >= first), name


@pytest.mark.parametrize("example", ["hf_trainer", "trl_sft", "trl_dpo", "peft_lora"])
def test_the_example_runs(workers, tmp_path, example):
    script = ROOT / "launch" / "examples" / f"{example}.py"
    assert len(script.read_text().splitlines()) <= 60
    [counts] = workers(1).run(trainers.run_example, script, "--output", str(tmp_path), "--epochs", "1")
    share = {"peft_lora": 1}.get(example, 2)
    assert sum(counts) == 8 * share  # 64 rows, 8 a step
    assert (tmp_path / "selection.jsonl").read_text().count("\n") == 8
