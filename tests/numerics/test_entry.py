"""`ds_agsel.initialize`: what it announces, schedulers with a value per group, groups that are changed by hand."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALL, LEARNING_RATE, SELECT, Case, build, finish, run_steps, tiny_model, weights

ROOT = Path(__file__).parents[2]


def learning_rates(case: Case, given: str) -> list[Any]:
    """The different learning rates at each step, of an engine made from two groups."""
    model = tiny_model(case)
    arguments: dict[str, Any] = {}
    if given == "object":
        groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == many]} for many in (True, False)]
        arguments["optimizer"] = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    engine = build(case, model, **arguments)
    rates = [sorted(set(rates)) for rates in run_steps(engine, case)["lrs"]]
    engine.destroy()
    return rates


WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0], "warmup_max_lr": [1e-2, 1e-3], "warmup_num_steps": 2}}
CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": [1e-3, 1e-4], "cycle_max_lr": [1e-2, 2e-3]}}
RANGE = {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": [1e-3, 1e-4]}}


def decay_groups(case: Case) -> list[Any]:
    import deepspeed
    from support import ds_config, param_groups

    model = tiny_model(case)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups(model, case), config=ds_config(case))
    rates = [sorted(set(rates)) for rates in run_steps(engine, case)["lrs"]]
    engine.destroy()
    return rates


@pytest.mark.parametrize("given", ["config", "object"])
@pytest.mark.parametrize("scheduler", [WARMUP, CYCLE, RANGE], ids=lambda scheduler: scheduler["type"])
def test_a_scheduler_with_a_value_per_group_goes_as_in_deepspeed(workers, scheduler, given):
    case = Case(model="net", decay_groups=True, steps=3, config={"scheduler": scheduler}, section={"policy": "all"})
    [plain] = workers(1).run(decay_groups, case.but(section=None))
    assert any(len(rates) == 2 for rates in plain)
    assert workers(1).run(learning_rates, case, given) == [plain]


def error_of(case: Case) -> str:
    from ds_agsel.errors import ConfigError

    with pytest.raises(ConfigError) as raised:
        build(case)
    return str(raised.value)


def test_a_list_of_another_length_is_refused_with_both_lengths(workers):
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-2, 1e-3, 1e-4]}}
    [message] = workers(1).run(error_of, Case(model="net", decay_groups=True, config={"scheduler": scheduler}))
    assert "scheduler.params.warmup_max_lr=[0.01, 0.001, 0.0001] has 3 values" in message
    assert "has 2 param groups. Give one value" in message


def changed_by_hand(case: Case) -> dict[str, Any]:
    """The learning rate set on the engine's own param groups, as schedulers of frameworks do."""
    engine = build(case)
    run_steps(engine, case, 0, 2)
    for group in engine.optimizer.param_groups:
        group["lr"] = 5 * LEARNING_RATE
    return finish(engine, run_steps(engine, case, 2))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_learning_rate_set_by_hand_on_the_split_groups_is_used_as_in_deepspeed(workers, stage):
    case = Case(model="net", stage=stage, steps=4)
    [plain] = workers(1).run(changed_by_hand, case.but(section=None))
    [ours] = workers(1).run(changed_by_hand, case.but(section=ALL))
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, ours["weights"][name]), name


def added_group(case: Case, to: str) -> tuple[str, bool]:
    from ds_agsel.errors import TrainingError

    model = tiny_model(case)
    *others, last = model.parameters()
    optimizer = torch.optim.AdamW(others, lr=LEARNING_RATE)
    engine = build(case, model, optimizer=optimizer)
    run_steps(engine, case, 0, 1)
    before = weights(engine)
    target = optimizer if to == "given" else engine.optimizer.optimizer
    target.add_param_group({"params": [last]})
    with pytest.raises(TrainingError) as raised:
        run_steps(engine, case, 1, 2)
    target.param_groups.pop()  # DeepSpeed's destroy() does not know it either
    same = all(torch.equal(before[name], weight) for name, weight in weights(engine).items())
    engine.destroy()
    return str(raised.value), same


@pytest.mark.parametrize("to", ["given", "inner"])
def test_a_group_added_later_is_refused_before_anything_changes(workers, to):
    [(message, same)] = workers(1).run(added_group, Case(model="net", stage=2), to)
    assert "ZeRO can't take up a group later" in message and "before" in message
    assert same


def announced(case: Case, **arguments: Any) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        from support import ds_config

        import ds_agsel

        engine = ds_agsel.initialize(model=tiny_model(case), config=ds_config(case), **arguments)[0]
    engine.destroy()
    return "\n".join(line for line in said.getvalue().splitlines() if line.startswith("adagrad_select: "))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {**SELECT, "steps_per_epoch": 40, "never_select": ["head"]},
            "policy adagrad_select updates 2 of 7 blocks at each step (1 never); steps explore with a "
            "probability that starts at 1 and falls until epoch 1 ends, after 40 steps (from "
            "adagrad_select.steps_per_epoch); optimizer states are in host memory",
        ),
        ({"policy": "all"}, "policy all updates 7 of 7 blocks at each step; optimizer states are in host memory"),
        ({"select_percent": 50}, "whose length is looked up after the first step"),
        ({"enabled": False}, "the section adagrad_select of the ds_config is disabled: DeepSpeed trains all blocks"),
        (None, "the section adagrad_select of the ds_config is missing: DeepSpeed trains all blocks"),
    ],
    ids=["section", "all", "unknown epoch", "disabled", "missing"],
)
def test_one_line_on_rank_0_says_what_is_trained(workers, section, said):
    case = Case(model="net", section=section)
    first, second = workers(2).run(announced, case)
    assert said in first and first.count("\n") == 0
    assert second == ""


ONE_PROCESS = """
import os, torch, ds_agsel
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
          "zero_optimization": {"stage": 2}, "adagrad_select": {"select_percent": 50}}
engine, *_ = ds_agsel.initialize(model=model, config=config)
engine.backward(engine(torch.randn(2, 8)).square().mean())
engine.step()
print(torch.distributed.get_world_size(), len(engine.selection.history), os.environ["LOCAL_RANK"])
"""


def test_a_process_that_no_launcher_started_is_one_rank(tmp_path):
    """Without mpi4py, which DeepSpeed's own discovery imports."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    (tmp_path / "mpi4py.py").write_text("raise ImportError('mpi4py was asked for')")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", ONE_PROCESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "1 1 0"
