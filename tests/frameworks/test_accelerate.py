"""Accelerate with `ds_agsel.install()`: loops around `accelerator.prepare`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from support import assert_identical
from torch.utils.data import DataLoader
from trainers import NEVER, SECTION, Heard, assert_engaged, forget_accelerate, rows, see_all_ranks, tiny_llama

import ds_agsel

START = {name: parameter.detach().clone() for name, parameter in tiny_llama().named_parameters()}
ACCUMULATION, EPOCHS = 2, 2


def ds_config(offload: str, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": offload}},
        "zero_force_ds_cpu_optimizer": False,
        "adagrad_select": copy.deepcopy(SECTION),
        **more,
    }


def train(
    config: Mapping[str, Any],
    *,
    loaders: str = "train",
    save_at: tuple[int, Path] | None = None,
    resume: tuple[int, Path] | None = None,
    sees_all_ranks: bool = True,
    adam: type = torch.optim.AdamW,
) -> dict[str, Any]:
    """``loaders``: "train", "train, evaluation" in one prepare, or "before" it, in one of its own."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim, DummyScheduler

    forget_accelerate()
    if sees_all_ranks:
        see_all_ranks()
    with ds_agsel.installed():
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=copy.deepcopy(dict(config))))
        model = tiny_llama()
        data = [{name: torch.tensor(value) for name, value in row.items()} for row in rows()]
        loader, evaluation = DataLoader(data, batch_size=2), DataLoader(data[:4], batch_size=2)
        if "optimizer" in config:
            optimizer: Any = DummyOptim(model.parameters(), lr=1e-2)
            scheduler: Any = DummyScheduler(optimizer, total_num_steps=40, warmup_num_steps=4)
        else:
            groups = [
                {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ]
            optimizer = adam(groups, lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        if loaders == "before":
            accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
            loader = accelerator.prepare(loader)
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        elif loaders == "train, evaluation":
            prepared = accelerator.prepare(model, loader, evaluation, optimizer, scheduler)
            model, loader, evaluation, optimizer, scheduler = prepared
        else:
            model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        if resume is not None:
            accelerator.load_state(str(resume[1]))
        rates, done = [], 0
        for _ in range(EPOCHS):
            for batch in loader:
                done += 1
                if resume is not None and done <= resume[0]:
                    continue
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                rates.append({group["lr"] for group in model.optimizer.param_groups})
                if save_at is not None and done == save_at[0]:
                    accelerator.save_state(str(save_at[1]))
        selection = model.selection
        return {
            "weights": {name: tensor.detach().clone() for name, tensor in model.module.named_parameters()},
            "history": selection.history,
            "counts": selection.update_counts,
            "blocks": {block.name: block.parameter_names for block in selection.blocks},
            "global_step": model.global_steps,
            "steps_per_epoch": selection.policy.context.steps_per_epoch,
            "batches": len(loader),
            "rates": rates,
            "samples": [] if selection.samples is None else [step.as_json() for step in selection.samples.history],
            "decay": {group["weight_decay"] for group in model.optimizer.param_groups},
        }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_selects_with_the_users_optimizer_and_scheduler(workers, offload, ranks):
    for run in workers(ranks).run(train, ds_config(offload)):
        assert_engaged(run, START)
        assert run["decay"] == {0.1, 0.0}
        assert all(len(rates) == 1 for rates in run["rates"])  # every split group follows the one schedule
        rates = [next(iter(rates)) for rates in run["rates"]]
        assert rates[-1] < rates[0] and {round(rate, 9) for rate in rates} <= {
            round(1e-2 * 0.9**step, 9) for step in range(4 * len(rates))
        }


def test_blocks_learn_from_some_rows_without_user_code(workers):
    [run] = workers(1).run(train, ds_config("none", adagrad_select={**SECTION, "select_percent": 100, "gast": {}}))
    assert_engaged(run, START)
    assert len(run["samples"]) == run["global_step"]
    assert run["samples"][0]["rows"] == [2] * ACCUMULATION  # an epoch's last batch has one row
    for step in run["samples"]:
        wanted = [(rows + 1) // 2 for rows in step["rows"]]
        assert step["taken"] and all([len(rows) for rows in taken] == wanted for taken in step["taken"].values())


def test_selects_with_the_ds_configs_optimizer_and_scheduler(workers):
    config = ds_config(
        "none",
        optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        scheduler={
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
    )
    [run] = workers(1).run(train, config)
    assert_engaged(run, START)
    assert len({rate for rates in run["rates"] for rate in rates}) > 3


@pytest.mark.parametrize("loaders", ["train", "train, evaluation", "before"])
def test_finds_the_steps_of_an_epoch(workers, loaders):
    for run in workers(2).run(train, ds_config("none"), loaders=loaders):
        assert run["steps_per_epoch"] == -(-run["batches"] // ACCUMULATION) == 3


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_resumed_run_is_the_run_that_did_not_stop(workers, tmp_path, offload, ranks):
    config = ds_config(offload)
    whole = workers(ranks).run(train, config, save_at=(4, tmp_path))
    resumed = workers(ranks).run(train, config, resume=(4, tmp_path))
    for before, after in zip(whole, resumed, strict=True):
        assert before["history"] == after["history"] and before["counts"] == after["counts"]
        assert_identical(before["weights"], after["weights"])


def warnings_of_a_run(sees_all_ranks: bool, config: Mapping[str, Any] | None = None, **how: Any) -> list[str]:
    heard = Heard()
    logging.getLogger("ds_agsel").addHandler(heard)
    try:
        train(config or ds_config("none"), sees_all_ranks=sees_all_ranks, **how)
    finally:
        logging.getLogger("ds_agsel").removeHandler(heard)
    return heard.said


def warned_of_ranks(sees_all_ranks: bool) -> tuple[bool, int]:
    """Whether a run warned of ranks that Accelerate does not see, and how many it sees."""
    from accelerate import PartialState

    said = warnings_of_a_run(sees_all_ranks)
    seen = PartialState().num_processes
    return any(f"Accelerate sees {seen} process and DeepSpeed has 2 ranks" in line for line in said), seen


def test_ranks_that_accelerate_does_not_see_are_told(workers):
    for warned, seen in workers(2).run(warned_of_ranks, False):  # accelerate 1.10 sees both, 1.15 one
        assert warned == (seen < 2)
    for warned, seen in workers(2).run(warned_of_ranks, True):
        assert not warned and seen == 2


@pytest.mark.parametrize("adam", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_accelerate_replaces_is_named(workers, adam):
    config = ds_config("cpu", zero_force_ds_cpu_optimizer=True)
    [said] = workers(1).run(warnings_of_a_run, True, config, adam=adam)
    replaced = any("replaced your SGD by DeepSpeedCPUAdam" in line for line in said)
    assert replaced == (adam is torch.optim.SGD), said


@pytest.mark.parametrize(
    ("example", "words"), [("accelerate_loop", ["--offload", "cpu"]), ("raw_deepspeed", ["--install"])]
)
def test_the_example_runs(workers, example, words):
    script = Path(__file__).parents[2] / "launch" / "examples" / f"{example}.py"
    assert len(script.read_text().splitlines()) <= 60
    [counts] = workers(1).run(trainers.run_example, script, "--epochs", "1", *words)
    assert sum(counts) == 6 * 2  # 24 rows, 4 a step


def fails(config: Mapping[str, Any]) -> str:
    try:
        train(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it trained")


def test_an_unknown_block_is_refused_before_training(workers):
    config = ds_config("none", adagrad_select={"never_select": [NEVER + "1"]})
    [said] = workers(1).run(fails, config)
    assert said.startswith("ConfigError") and f'Did you mean "{NEVER}"?' in said
