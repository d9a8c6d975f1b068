"""What users do around a step: evaluation, `loss.backward()`, activation checkpointing, optimizers, schedulers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from reference_runs import assert_follows_reference
from support import (
    ALL,
    BETAS,
    EPS,
    LEARNING_RATE,
    SELECT,
    WEIGHT_DECAY,
    Case,
    assert_identical,
    batch,
    build,
    case_id,
    ds_config,
    finish,
    observe_state,
    param_groups,
    run_steps,
    tiny_model,
    train,
)
from test_reference import FP32
from tiny_models import TinyNet

from ds_agsel.errors import ConfigError, TrainingError

CASES = [
    *(Case(stage=stage, offload=offload, accumulation=2) for stage, offload in product((1, 2), ("none", "cpu"))),
    Case(stage=3, offload="cpu", accumulation=2, zero={"stage3_param_persistence_threshold": 50}),
]
KEPT = ("losses", "norms", "weights", "partitions", "history", "counts", "plan")


def assert_same_run(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert_identical({key: one[key] for key in KEPT}, {key: other[key] for key in KEPT})


def evaluate(event: str, engine: Any, step: int) -> None:
    """Evaluate before, within and after each accumulation window: with and without no_grad, in both modes."""
    data = batch(Case(), 77, step, 0)
    with torch.no_grad():
        engine(**data)
    engine.eval()
    engine(**data)
    with torch.no_grad():
        engine(**data)
        engine.module(**data)
    engine.train()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_evaluation_between_steps_changes_nothing(trained, workers, case, ranks):
    assert_same_run(trained(case, ranks), workers(ranks).run(train, case, evaluate))


def train_by_loss_backward(case: Case) -> dict[str, Any]:
    engine = build(case)
    engine.backward = lambda loss: loss.backward()
    return finish(engine, run_steps(engine, case))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_backward_is_engine_backward(trained, workers, case, ranks):
    case = case.but(accumulation=1)
    assert_same_run(trained(case, ranks), workers(ranks).run(train_by_loss_backward, case))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_backward_in_an_accumulation_window_is_plain_deepspeeds(workers, case, ranks):
    """Not engine.backward's: DeepSpeed 0.19.8 divides by the accumulation steps at each output that has a hook, so
    twice for a model that returns its loss and its logits."""
    plain = workers(ranks).run(train_by_loss_backward, case.but(section=None))
    for expected, found in zip(plain, workers(ranks).run(train_by_loss_backward, case.but(section=ALL)), strict=True):
        kept = ("losses", "norms", "weights", "partitions")
        assert_identical({key: expected[key] for key in kept}, {key: found[key] for key in kept})


def train_checkpointed(case: Case, kind: str) -> dict[str, Any] | str:
    """A run with activation checkpointing, or the text of the refusal."""
    model = tiny_model(case)
    if isinstance(model, TinyNet):
        model.checkpointing = kind
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    engine = build(case, model)
    try:
        result = run_steps(engine, case, observe=observe_state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return finish(engine, result)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, marks=pytest.mark.slow) if place else case for place, case in enumerate(CASES)),
        *(Case(model="net", stage=stage, offload=offload) for stage, offload in ((2, "none"), (2, "cpu"), (3, "none"))),
    ],
    ids=case_id,
)
def test_activation_checkpointing_trains_or_is_refused(workers, case, kind, ranks):
    runs = workers(ranks).run(train_checkpointed, case, kind)
    if kind == "reentrant" and case.model == "net":  # its segments have no input that requires a gradient
        assert all(isinstance(run, str) and "use_reentrant=False" in run for run in runs), runs
    else:
        assert_follows_reference(case, runs, FP32)


def schedule(step: int) -> float:
    return 1 / (1 + step) if step % 3 else 1.0


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    deepspeeds = {"DeepSpeedCPUAdam": DeepSpeedCPUAdam, "FusedAdam": FusedAdam}
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, **deepspeeds}
    return kinds[name](parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)


def train_with_own_optimizer(case: Case, how: str, name: str, scheduler: str) -> dict[str, Any]:
    """A run with an optimizer made by the script, as an object or by a callable, and a scheduler made by it."""
    import ds_agsel

    model = tiny_model(case)
    config = ds_config(case)
    del config["optimizer"]
    arguments: dict[str, Any] = {"model_parameters": param_groups(model, case)}
    if how == "object":
        arguments = {"optimizer": make_optimizer(name, param_groups(model, case))}
    else:
        arguments["optimizer"] = lambda parameters: make_optimizer(name, parameters)
    if scheduler == "made earlier":
        arguments["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(arguments["optimizer"], schedule)
    elif scheduler == "callable":
        arguments["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    engine = ds_agsel.initialize(model=model, config=config, **arguments)[0]
    return finish(engine, run_steps(engine, case, observe=observe_state))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "how, name, offload, scheduler",
    [
        ("object", "AdamW", "none", "made earlier"),
        ("object", "AdamW", "cpu", "made earlier"),
        ("object", "AdamW", "none", "callable"),
        ("object", "Adam", "none", "none"),
        ("object", "DeepSpeedCPUAdam", "cpu", "made earlier"),
        ("object", "FusedAdam", "none", "made earlier"),
        ("callable", "AdamW", "none", "callable"),
        ("callable", "DeepSpeedCPUAdam", "cpu", "none"),
    ],
)
def test_own_optimizers_and_schedulers_follow_the_reference(workers, how, name, offload, scheduler, ranks):
    case = Case(offload=offload, decay_groups=True)
    runs = workers(ranks).run(train_with_own_optimizer, case, how, name, scheduler)
    wanted: Callable[[int], float] = schedule if scheduler != "none" else lambda step: 1.0
    assert_follows_reference(case, runs, FP32, schedule=wanted, decoupled=name != "Adam")
    for run in runs:  # a scheduler steps right after the optimizer: what is seen then is the next step's rate
        for step, rates in enumerate(run["lrs"], start=1):
            assert rates == pytest.approx([LEARNING_RATE * wanted(step)] * len(rates))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_scheduler_of_the_ds_config_reaches_every_group(workers, offload, ranks):
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 3, "total_num_steps": 8, "warmup_max_lr": 0.02},
    }
    for run in workers(ranks).run(train, Case(offload=offload, decay_groups=True, config={"scheduler": scheduler})):
        assert all(len(set(rates)) == 1 for rates in run["lrs"])
        assert len({rates[0] for rates in run["lrs"]}) > 4


def refusal(case: Case, optimizer: str) -> str:
    import ds_agsel

    model = tiny_model(case)
    config = ds_config(case)
    arguments: dict[str, Any] = {}
    if optimizer == "object":
        arguments["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    elif optimizer == "amsgrad":
        arguments["optimizer"] = torch.optim.AdamW(model.parameters(), amsgrad=True)
    elif optimizer == "callable":
        arguments["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    else:
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    if arguments:
        del config["optimizer"]
    try:
        ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("optimizer", ["object", "callable", "ds_config"])
def test_other_optimizers_are_refused_by_name(workers, optimizer):
    (message,) = workers(1).run(refusal, Case(), optimizer)
    assert message.startswith("ConfigError") and "SGD" in message


def test_amsgrad_is_refused(workers):
    (message,) = workers(1).run(refusal, Case(), "amsgrad")
    assert message == "ConfigError: optimizer amsgrad=True can't be used with adagrad_select. Set amsgrad=False."


def offloaded_between_steps(case: Case) -> str:
    """What offload_states() says in a run that ends as if it had not been called."""
    undisturbed = train(case, observe_state)["weights"]
    engine = build(case)
    run_steps(engine, case, 0, 2)
    with pytest.raises(ConfigError) as refused:
        engine.offload_states()
    assert_identical(undisturbed, finish(engine, run_steps(engine, case, 2))["weights"])
    return str(refused.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_states_is_refused_and_changes_nothing(workers, stage):
    (message,) = workers(1).run(offloaded_between_steps, Case(stage=stage))
    assert "engine.offload_states()" in message and "step_device='accelerator'" in message


def autocast_run(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case, observe_state) for case in cases]


@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_leaves_unselected_blocks_and_agrees_on_the_selection(fresh_workers, ranks):
    cases = [
        Case(stage=stage, offload=offload, accumulation=2, section=SELECT, steps=5,
             config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
        for stage, offload in product((1, 2, 3), ("none", "cpu"))
        # On several ranks ZeRO-3 gathers weights in bf16, which the reference does not; test_plain_deepspeed has it.
        if stage < 3 or ranks == 1
    ]  # fmt: skip
    tolerance = {"exp_avg": 0.1, "exp_avg_sq": 0.1, "masters": 0.2}  # bf16 gradients of the linear layers
    for case, runs in zip(cases, zip(*fresh_workers(ranks).run(autocast_run, cases), strict=True), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # the reference rounds as the run does
            assert_follows_reference(case, runs, tolerance)


def backward_of_nothing() -> str:
    with pytest.raises(TrainingError) as refused:
        build(Case()).backward(torch.ones(()))
    return str(refused.value)


def test_a_loss_that_nothing_selected_reaches_is_told_why(workers):
    [said] = workers(1).run(backward_of_nothing)
    assert "use_reentrant=False" in said
