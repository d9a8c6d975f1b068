"""HF Trainer with one line more: `ds_agsel.install()`."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
import transformers
from support import assert_identical
from trainers import AUTO_SCHEDULER, NEVER, assert_engaged, ds_config, tiny_llama

from ds_agsel.report.runs import read_run

START = {name: parameter.detach().clone() for name, parameter in tiny_llama().named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "none"), (2, "cpu")])
def test_selects(workers, tmp_path, stage, offload, ranks):
    runs = workers(ranks).run(trainers.train, tmp_path, ds_config(stage, offload, scheduler=AUTO_SCHEDULER))
    for run in runs:
        assert_engaged(run, START)
        assert run["history"] == runs[0]["history"]
        assert_identical(runs[0]["weights"], run["weights"])
        losses = [line["loss"] for line in run["logs"] if "loss" in line]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows", [20, 21, 22])
@pytest.mark.parametrize("drop_last", [False, True])
def test_finds_the_trainers_own_steps_per_epoch(workers, tmp_path, rows, drop_last, ranks):
    [run, *_] = workers(ranks).run(
        trainers.train, tmp_path, ds_config(), num_rows=rows, dataloader_drop_last=drop_last,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    assert run["steps_per_epoch"] * 2 == run["max_steps"] == run["global_step"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_resumed_run_is_the_run_that_did_not_stop(workers, tmp_path, offload, ranks):
    config = ds_config(2, offload, scheduler=AUTO_SCHEDULER)
    # With transformers 4 a Trainer, plain as well, resumes any epoch but the first with other rows, and loses a step
    # of an epoch whose last accumulation window is not full.
    rows, at = (trainers.ROWS, 4) if int(transformers.__version__.split(".")[0]) >= 5 else (24, 2)
    whole = workers(ranks).run(trainers.train, tmp_path, config, num_rows=rows, save_strategy="steps", save_steps=at)
    lines = (tmp_path / "selection.jsonl").read_text()
    resumed = workers(ranks).run(
        trainers.train, tmp_path, config, num_rows=rows, resume=str(tmp_path / f"checkpoint-{at}")
    )
    for before, after in zip(whole, resumed, strict=True):
        assert_engaged(after, START)
        assert before["history"] == after["history"] and before["counts"] == after["counts"]
        assert_identical(before["weights"], after["weights"])
    assert (tmp_path / "selection.jsonl").read_text() == lines
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(whole[0]["global_step"]))


def test_the_best_model_is_loaded_at_the_end(workers, tmp_path):
    from safetensors.torch import load_file

    [run] = workers(1).run(
        trainers.train, tmp_path, ds_config(), num_train_epochs=3, save_strategy="epoch", eval_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    evaluations = [line["eval_loss"] for line in run["logs"] if "eval_loss" in line]
    assert evaluations[0] == max(evaluations)  # "best" here: the first of three
    best = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    saved = load_file(best / "model.safetensors")
    assert_identical({name: saved[name] for name in run["weights"]}, run["weights"])
    # The selection went back with the weights.
    assert len(run["history"]) == run["global_step"] // 3


def test_every_split_group_follows_the_trainers_own_scheduler(workers, tmp_path):
    [run] = workers(1).run(
        trainers.train, tmp_path, ds_config(offload="cpu", optimizer=None), lr_scheduler_type="cosine", warmup_steps=2,
    )  # fmt: skip
    assert_engaged(run, START)
    rates = [line["learning_rate"] for line in run["logs"] if "learning_rate" in line]
    steps = run["global_step"]
    expected = [1e-2 * min(1, step / 2) for step in range(1, 3)] + [
        5e-3 * (1 + math.cos(math.pi * (step - 2) / (steps - 2))) for step in range(3, steps + 1)
    ]
    # The Trainer logs the rate of the step before or of the next, by its version.
    assert rates == pytest.approx(expected[: len(rates)]) or rates == pytest.approx([0, *expected][: len(rates)])
    assert {group["weight_decay"] for group in run["groups"]} == {0.1, 0.0}
    assert len({group["lr"] for group in run["groups"]}) == 1
    assert len(run["groups"]) > len(run["blocks"])  # decay and no decay, per block


def test_with_every_block_it_is_the_trainer_without_us(workers, tmp_path):
    section = {"policy": "all"}
    [ours] = workers(1).run(trainers.train, tmp_path / "ours", ds_config(section=section))
    [plain] = workers(1).run(
        trainers.train, tmp_path / "plain", ds_config(section=section), install=False, callback=False
    )
    assert plain["history"] is None and plain["engine"] == "DeepSpeedEngine"
    assert {record.blocks for record in ours["history"]} == {tuple(range(5))}
    moved = math.sqrt(sum((plain["weights"][n] - START[n]).square().sum().item() for n in START))
    apart = math.sqrt(sum((plain["weights"][n] - ours["weights"][n]).square().sum().item() for n in START))
    assert apart <= 1e-3 * moved  # fp32; the norm for clipping is summed in another order


def test_uninstalled_it_is_plain_deepspeed_again(workers, tmp_path):
    [with_section] = workers(1).run(trainers.train, tmp_path / "a", ds_config(), install=False, callback=False)
    [without] = workers(1).run(trainers.train, tmp_path / "b", ds_config(section=None), install=True, callback=False)
    assert with_section["history"] is None and without["history"] is None
    assert_identical(with_section["weights"], without["weights"])


@pytest.mark.parametrize("in_config", [True, False])
def test_an_optimizer_given_to_the_trainer_is_not_used_and_we_say_so(workers, tmp_path, in_config):
    config = ds_config(**({} if in_config else {"optimizer": None}))
    [run] = workers(1).run(trainers.train, tmp_path, config, optimizers="sgd", lr_scheduler_type="constant")
    assert_engaged(run, START)
    assert {group["lr"] for group in run["groups"]} == {1e-2}  # TrainingArguments', not 0.0123
    assert any("optimizers=(SGD, ...)) is not used" in line for line in run["said"])


def fails(folder: Path, **changes: Any) -> str:
    try:
        trainers.train(folder, **changes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it trained")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": ds_config(), "install": False}, "ds_agsel.install.. was not called"),
        ({"deepspeed": ds_config(section=None)}, "adagrad_select section is missing"),
        ({"deepspeed": ds_config(section={"enabled": False})}, "adagrad_select section is disabled"),
        ({"deepspeed": None}, "TrainingArguments.deepspeed is not set"),
        ({"deepspeed": ds_config(optimizer=None), "optim": "adafactor"}, "Adafactor can't be used"),
        ({"deepspeed": ds_config(section={**trainers.SECTION, "steps_per_epoch": "x"})}, "steps_per_epoch"),
    ],
)
def test_being_dropped_is_noticed(workers, tmp_path, changes, message):
    import re

    [said] = workers(1).run(fails, tmp_path, **changes)
    assert re.search(message, said), said


def printed(folder: Path) -> str:
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        trainers.train(folder, ds_config(), report_to=["tensorboard"])
    return console.getvalue()


def test_the_console_shows_the_selection_without_a_value_for_each_block(workers, tmp_path):
    pytest.importorskip("tensorboard")
    [console] = workers(1).run(printed, tmp_path)
    assert "adagrad_select/explore_rate" in console and NEVER not in console


def test_the_logs_reach_what_the_trainer_reports_to(workers, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    [run] = workers(1).run(
        trainers.train, tmp_path, ds_config(), report_to=["tensorboard"], eval_strategy="epoch",
    )  # fmt: skip
    [file] = [path for path in tmp_path.rglob("events.out.tfevents.*")]
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    explore = [(event.step, event.value) for event in events.Scalars("train/adagrad_select/explore")]
    assert explore == [(r.step + 1, float(r.phase == "explore")) for r in run["history"]]
    saved = [event.value for event in events.Scalars("train/adagrad_select/saved_state_bytes")]
    total = sum(tensor.numel() for tensor in START.values())
    numels = [sum(START[name].numel() for name in names) for names in run["blocks"].values()]
    assert saved == [8 * (total - sum(numels[index] for index in r.blocks)) for r in run["history"]]
    for name, count in zip(run["blocks"], run["counts"], strict=True):
        assert events.Scalars(f"train/adagrad_select/block_counts/{name}")[-1].value == count
    for index, name in enumerate(run["blocks"]):
        selected = [event.value for event in events.Scalars(f"train/adagrad_select/selected/{name}")]
        assert selected == [float(index in record.blocks) for record in run["history"]]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in metrics if line["event"] == "train"]
    assert [line["step"] for line in train] == list(range(run["global_step"]))
    assert [line["phase"] for line in train] == [record.phase for record in run["history"]]
    assert [line["loss"] for line in train] == [line["loss"] for line in run["logs"] if "loss" in line]
    assert sum(line["event"] == "validation" for line in metrics) == 2
    selection = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [tuple(line["blocks"]) for line in selection] == [record.blocks for record in run["history"]]
    found = read_run(tmp_path)
    assert found.is_finished and found.problems == [] and tuple(found.counts()) == run["counts"]
    assert set(found.step_seconds()) == {"explore", "exploit"} and len(found.validation) == 2
    assert NEVER in {block["name"] for block in json.loads((tmp_path / "blocks.json").read_text())["blocks"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_learn_from_some_rows_without_user_code(workers, tmp_path, ranks):
    config = ds_config(2, "none")
    config["adagrad_select"] = {**config["adagrad_select"], "select_percent": 100, "gast": {}}
    [run, *_] = workers(ranks).run(trainers.train, tmp_path, config, per_device_train_batch_size=4)
    assert_engaged(run, START)
    choices = read_run(tmp_path).choices
    assert choices and all(len(choice.taken) == (choice.rows + 1) // 2 for choice in choices)
    assert max(choice.rows for choice in choices) == 4


@pytest.mark.parametrize("stage", [2, 3])
def test_trains_a_few_entries_of_the_mlps(workers, tmp_path, stage):
    from safetensors.torch import load_file

    section = {"policy": "all", "sparse_grad": {"entries_percent": 5, "calibration_steps": 2, "refresh_steps": 3}}
    config = ds_config(stage, section=section)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    runs = workers(2).run(trainers.train, tmp_path, config, num_train_epochs=3, save_strategy="epoch")
    assert len(runs[0]["history"]) == runs[0]["global_step"] - 2  # the first two calibrate
    [*_, last] = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    saved = load_file(last / "model.safetensors")
    assert not [name for name in saved if "sparse_grad" in name]
    moved = {name: not torch.equal(saved[name], START[name]) for name in saved if name in START}
    assert all(moved.values()) and any("up_proj" in name for name in moved)


@pytest.mark.parametrize(("architecture", "stage"), [("bert", 2), ("roberta", 3), ("gpt2", 2)])
def test_trains_a_few_entries_of_encoders_and_of_gpt2(workers, tmp_path, architecture, stage):
    from safetensors.torch import load_file

    section = {"policy": "all", "sparse_grad": {"entries_percent": 5, "calibration_steps": 2, "refresh_steps": 5}}
    config = ds_config(stage, section=section)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    [run] = workers(1).run(
        trainers.train, tmp_path, config, architecture=architecture, num_train_epochs=3, save_strategy="epoch"
    )
    start = dict(trainers.tiny_other(architecture).named_parameters())
    matrices = {matrix.name: matrix for matrix in read_run(tmp_path).matrices}
    ends = {"gpt2": ("mlp.c_fc.weight", "mlp.c_proj.weight")}.get(
        architecture, ("intermediate.dense.weight", "output.dense.weight")
    )
    assert len(matrices) == 4 and all(name.endswith(ends) and ".attention." not in name for name in matrices)
    [*_, last] = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    saved = load_file(last / "model.safetensors")
    assert not [name for name in saved if "sparse_grad" in name] and matrices.keys() <= saved.keys()
    assert not [name for name in matrices if torch.equal(saved[name], start[name])]
    losses = [line["loss"] for line in run["logs"] if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_single_matrices_are_selected_and_logged(workers, tmp_path):
    section = {"granularity": "module", "select_percent": 15, "explore_decay": 0.2}
    [run] = workers(1).run(trainers.train, tmp_path, ds_config(section=section))
    blocks = run["blocks"]
    moved = {name for name, weight in run["weights"].items() if not torch.equal(weight, START[name])}
    chosen = {index for record in run["history"] for index in record.blocks}
    assert moved == {name for index, names in enumerate(blocks.values()) if index in chosen for name in names}
    assert chosen and all("_proj" in name for name in moved), "embedding and norms are not trained"
    matrices = sum(START[name].numel() for name in START if "_proj" in name)
    sizes = [sum(START[name].numel() for name in names) for names in blocks.values()]
    for record in run["history"]:
        assert sum(sizes[index] for index in record.blocks) <= 0.15 * matrices
    assert read_run(tmp_path).problems == []
