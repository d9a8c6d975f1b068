"""The methods that AdaGradSelect is compared with, through the real launcher: what works, and how the others fail."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import ROOT, command, environment, error_lines, lines_of, tiny_model  # noqa: F401
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(300)

PACKAGES = {"badam": "badam", "galore": "galore_torch", "apollo": "apollo_torch", "lora": "peft"}


def peer(
    model: Path, output: Path, method: str, option: str | None, config: str
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    pytest.importorskip(PACKAGES.get(method.partition("_zero")[0], "torch"))
    options: dict[str, str | None] = {"--method": method, "--steps": "8", "--test-rows": "0"}
    if option:
        options["--method-option"] = option
    words = command(model, output, f"configs/{config}.json", 1, options, script="launch/peers.py")
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)


def summary_of(output: Path, result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


def assert_measured(output: Path, summary: dict[str, Any], method: str) -> None:
    """The folder is that of launch/train.py, with what the comparison needs."""
    assert summary["method"] == method and summary["steps"] == 8
    assert summary["loss"]["validation_last"] < summary["loss"]["validation_first"]
    assert summary["step_seconds"]["all"] <= summary["step_seconds_p90"]["all"]
    assert summary["optimizer_state_bytes"] > 0 and summary["gradient_bytes"] > 0
    memory = summary["peak_memory_bytes"]
    assert memory["host"] >= memory["host_in_steps"] > 100e6
    records = [record for record in lines_of(output / "metrics.jsonl") if record["event"] == "train"]
    spent = [record["processor_seconds"] for record in records]
    assert spent == sorted(spent) and spent[0] > 0 and spent[-1] == summary["processor_seconds"]
    assert all(math.isfinite(record["loss"]) and record["step_seconds"] > 0 for record in records)


def test_lora_trains_its_adapters_and_saves_them_merged(tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    result = peer(tiny_model, tmp_path, "lora", "rank=4", "zero2")
    summary = summary_of(tmp_path, result)
    assert_measured(tmp_path, summary, "lora")
    assert summary["faults"] == [] and summary["method_options"]["rank"] == 4
    # rank x (in + out) of each projection: q, o 32 x 32, k, v 32 x 16, the MLP's 32 x 64; four layers.
    numel = 4 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert summary["optimizer_state_bytes"] == 2 * 4 * numel and summary["master_weight_bytes"] == 4 * numel
    before, after = weights(tiny_model), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


@pytest.mark.slow
def test_lisa_in_plain_pytorch_moves_what_it_drew(tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    result = peer(tiny_model, tmp_path, "lisa", "every=100", "zero2")
    summary = summary_of(tmp_path, result)
    assert_measured(tmp_path, summary, "lisa")
    assert summary["faults"] == []
    before, after = weights(tiny_model), weights(tmp_path / "model")
    moved = {name.split(".")[2] for name in before if "_proj" in name and not torch.equal(before[name], after[name])}
    assert len(moved) == 2
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    frozen = sum(before[name].numel() for name in before if "layers" in name and name.split(".")[2] not in moved)
    trained = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()) - frozen
    assert summary["optimizer_state_bytes"] == 2 * 4 * trained and summary["gradient_bytes"] >= 2 * trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("adagrad_select", None), ("full", None), ("offload", None), ("badam", "every=3"), ("galore", "rank=4"),
        ("apollo", "rank=4"), ("sparse_grad", "calibration_steps=2"),
    ],
)  # fmt: skip
def test_every_other_method_trains(tiny_model: Path, tmp_path: Path, method: str, option: str | None) -> None:  # noqa: F811
    summary = summary_of(tmp_path, peer(tiny_model, tmp_path, method, option, "zero2"))
    assert_measured(tmp_path, summary, method)
    assert summary["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "option", "config", "fault"),
    [
        ("lisa_zero", "every=3", "zero2", "Frozen parameters moved in 5 of 8 steps (3, 4, 5, 6, 7): mean |Δw| up to"),
        ("lisa_zero", "every=3", "zero2_offload", "Frozen parameters moved in 5 of 8 steps"),
        ("badam_zero3", "every=3", "zero3", "No weight changed in 2 of 8 steps (4, 7)."),
        ("zenflow", None, "zero2", "gradient_accumulation_steps became 4, where the ds_config says 1."),
        ("zenflow", None, "zero2", "parameters changed as the engine was made: mean |Δw| up to 2."),
    ],
)
def test_faults_of_others_are_seen(
    tiny_model: Path, tmp_path: Path, method: str, option: str, config: str, fault: str  # noqa: F811
) -> None:  # fmt: skip
    summary = summary_of(tmp_path, peer(tiny_model, tmp_path, method, option, config))
    assert any(fault in sentence for sentence in summary["faults"]), summary["faults"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_badam_under_the_first_stages_fails_with_its_message(tiny_model: Path, tmp_path: Path, stage: int) -> None:  # noqa: F811
    result = peer(tiny_model, tmp_path, f"badam_zero{stage}", "every=3", f"zero{stage}")
    assert result.returncode != 0 and not (tmp_path / "summary.json").exists()
    assert error_lines(result)[-1] == "error: AssertionError: The low precision parameter's gradient is None."
