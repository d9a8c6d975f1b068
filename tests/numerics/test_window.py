"""A step's window is opened by whatever comes first and leaves nothing behind: other ways in, exceptions, loads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    ALL,
    SELECT,
    TOPK,
    Case,
    assert_identical,
    batch,
    build,
    case_id,
    ds_config,
    finish,
    forward_backward,
    run_steps,
    tiny_model,
    weights,
)

import ds_agsel
from ds_agsel.errors import TrainingError

STAGES = [
    Case(stage=stage, offload=offload, steps=5) for stage, offload in product((1, 2, 3), ("none", "cpu")) if stage != 1
]
STAGES.append(Case(stage=1, steps=5))
KEPT = ("weights", "partitions", "history", "counts", "plan")


def kept(run: dict[str, Any]) -> dict[str, Any]:
    return {key: run[key] for key in KEPT if key in run}


def through_module(case: Case, which: str) -> dict[str, Any]:
    """A run whose first micro-steps, or all, go through ``engine.module``, or through a part of it."""
    engine = build(case)
    for step in range(case.steps):
        for micro_step in range(case.accumulation):
            data = batch(case, step, micro_step, torch.distributed.get_rank())
            if which == "part":
                hidden = engine.module.model(data["input_ids"]).last_hidden_state
                logits = engine.module.lm_head(hidden)
                loss = engine.module.loss_function(logits=logits, labels=data["labels"], vocab_size=logits.shape[-1])
            else:
                loss = (engine.module if which == "all" or micro_step == 0 else engine)(**data).loss
            engine.backward(loss)
            engine.step()
    return finish(engine, {})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("which", ["first", "all", "part"])
@pytest.mark.parametrize("stage, offload", [(2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_a_forward_through_the_module_is_one_through_the_engine(trained, workers, stage, offload, which, ranks):
    if stage == 3 and which != "first":
        pytest.skip("plain DeepSpeed 0.19.8 loses sums where no micro-step of ZeRO-3 goes through the engine")
    # One bucket for all: DeepSpeed says which micro-step is the last where the engine's own forward ends, and reads it
    # when it empties a bucket.
    case = Case(stage=stage, offload=offload, accumulation=2, steps=5, zero={"reduce_bucket_size": 10**6})
    for section in (ALL, SELECT):
        expected = trained(case.but(section=section), ranks)
        for one, other in zip(expected, workers(ranks).run(through_module, case.but(section=section), which)):
            assert_identical(kept(one), kept(other))


def user_freezes(case: Case, when: str) -> dict[str, Any]:
    """The user freezes layer 1 once, before the first step or within the second one's window: what has moved since."""
    engine = build(case)
    frozen = {n: p for n, p in engine.module.named_parameters() if ".layers.1." in n}
    start: dict[str, Any] = {}

    def freeze() -> None:
        start.update(weights(engine))
        for index, parameter in enumerate(frozen.values()):
            if index % 2:
                parameter.requires_grad_(False)
            else:
                parameter.requires_grad = False

    for step in range(case.steps):
        for micro_step in range(case.accumulation):
            if (step, micro_step) == {"before": (0, 0), "between": (1, 0), "within": (1, 1)}[when]:
                freeze()
            forward_backward(engine, case, step, micro_step)
            engine.step()
    now = weights(engine)
    moved = [name for name in frozen if not torch.equal(start[name], now[name])]
    still = [name for name, parameter in frozen.items() if parameter.requires_grad]
    trains = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    result = {"moved": moved, "thawed": still, "trains": len(trains), "frozen": len(frozen)}
    counts = [record.blocks for record in engine.selection.history]
    return finish(engine, result | {"history": counts, "all": len(list(engine.module.parameters()))})


@pytest.mark.parametrize("when", ["before", "between", "within"])
@pytest.mark.parametrize("stage, offload", [(1, "none"), (2, "none"), (2, "cpu"), (3, "none")])
def test_what_the_user_freezes_stays_frozen_and_untrained(workers, stage, offload, when):
    section = {"policy": "cyclic", "select_percent": 50, "seed": 1}
    case = Case(stage=stage, offload=offload, accumulation=2, section=section, steps=6)
    for run in workers(1).run(user_freezes, case, when):
        assert run["moved"] == [] and run["thawed"] == []
        assert run["trains"] == run["all"] - run["frozen"], "ours are given back"
        assert all(2 not in blocks for step, (_, _, blocks) in enumerate(run["history"]) if step > 1)


class Interrupt(Exception):
    pass


def raise_once(parameter: torch.nn.Parameter) -> Callable[[], None]:
    def hook(gradient: torch.Tensor) -> None:
        raise Interrupt

    return parameter.register_hook(hook).remove


def interrupted(case: Case, where: str, steps: tuple[int, ...]) -> dict[str, Any]:
    """A run in which a bad batch is met before each of ``steps``: an exception in the middle of it, which the user
    catches."""
    engine = build(case)
    parameters = dict(engine.module.named_parameters())

    def bad_batch() -> None:
        blocks = engine.selection.plan.blocks or (2,)
        target = parameters[engine.selection.blocks[blocks[0]].parameter_names[0]]
        if where == "forward":
            handle = engine.module.model.norm.register_forward_pre_hook(_raise)
            remove = handle.remove
        elif where in ("backward", "loss.backward"):
            remove = raise_once(target)
        else:
            stock = engine.optimizer._before_update
            engine.optimizer._before_update = _raise
            remove = lambda: setattr(engine.optimizer, "_before_update", stock)  # noqa: E731
        with pytest.raises(Interrupt):
            data = batch(case, 99, 0, 0)
            loss = engine(**data).loss
            if where == "loss.backward":
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
        remove()

    for step in range(case.steps):
        if step in steps:
            bad_batch()
        run_steps(engine, case, step, step + 1)
    return finish(engine, {})


def _raise(*args: Any, **kwargs: Any) -> None:
    raise Interrupt


@pytest.mark.parametrize("where", ["forward", "backward", "loss.backward", "step"])
@pytest.mark.parametrize("case", STAGES, ids=case_id)
def test_a_bad_batch_leaves_nothing_behind(trained, workers, case, where):
    """Steps 0 and 3 explore, 1 and 2 exploit."""
    if where == "forward" and case.stage == 3:
        pytest.skip("plain ZeRO-3 does not go on from an exception in forward either: parameters are in flight")
    expected = trained(case, 1)
    for one, other in zip(expected, workers(1).run(interrupted, case, where, (0, 1, 3)), strict=True):
        assert_identical(kept(one), kept(other))


@pytest.mark.parametrize("case", STAGES, ids=case_id)
def test_a_bad_first_micro_step_of_an_accumulation_window_leaves_nothing_behind(trained, workers, case):
    case = case.but(accumulation=2)
    expected = trained(case, 1)
    for one, other in zip(expected, workers(1).run(interrupted, case, "backward", (1, 2, 3)), strict=True):
        assert_identical(kept(one), kept(other))


def dropped_by_the_user(case: Case, how: str) -> dict[str, Any]:
    """An explore step whose first backward the user drops, by ``zero_grad`` of the engine or the optimizer."""
    engine = build(case)
    for step in range(case.steps):
        forward_backward(engine, case, 50 + step, 0)
        (engine if how == "engine" else engine.optimizer).zero_grad()
        run_steps(engine, case, step, step + 1)
    return finish(engine, {})


@pytest.mark.parametrize("how", ["engine", "optimizer"])
@pytest.mark.parametrize("stage, offload", [(2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_zero_grad_drops_what_an_explore_step_has_scored(trained, workers, stage, offload, how):
    case = Case(stage=stage, offload=offload, section=TOPK, steps=3)
    for one, other in zip(trained(case, 1), workers(1).run(dropped_by_the_user, case, how), strict=True):
        assert_identical(kept(one), kept(other))


def zero_grad_between(case: Case) -> dict[str, Any]:
    """A loop that calls ``engine.zero_grad()`` before each backward, also within a window."""
    engine = build(case)
    for step in range(case.steps):
        for micro_step in range(case.accumulation):
            loss = engine(**batch(case, step, micro_step, 0)).loss
            engine.zero_grad()
            engine.backward(loss)
            engine.step()
    return finish(engine, {})


@pytest.mark.parametrize("section", [ALL, SELECT], ids=["all", "select"])
@pytest.mark.parametrize("stage, offload", [(2, "none"), (2, "cpu"), (3, "none")])  # ZeRO-1 sums in param.grad
def test_zero_grad_before_each_backward_changes_nothing(trained, workers, stage, offload, section):
    case = Case(stage=stage, offload=offload, accumulation=2, steps=5, section=section)
    for one, other in zip(trained(case, 1), workers(1).run(zero_grad_between, case), strict=True):
        assert_identical(kept(one), kept(other))


def load_within(case: Case, folder: Path, save_at: int) -> dict[str, Any]:
    """Save after some steps, train into a later window, load, and train on."""
    engine = build(case)
    run_steps(engine, case, 0, save_at)
    engine.save_checkpoint(str(folder), tag="here")
    run_steps(engine, case, save_at, save_at + 1)
    forward_backward(engine, case, 70, 0)
    engine.step()
    forward_backward(engine, case, 70, 1)
    engine.load_checkpoint(str(folder), tag="here")
    return finish(engine, run_steps(engine, case, save_at))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", STAGES, ids=case_id)
def test_a_load_within_an_accumulation_window_begins_a_new_one(trained, workers, tmp_path, case, ranks):
    case = case.but(accumulation=3)
    for one, other in zip(trained(case, ranks), workers(ranks).run(load_within, case, tmp_path, 2), strict=True):
        assert_identical(kept(one), kept(other))


def two_engines(case: Case, second: Case, ends_the_first: bool) -> tuple[dict[str, Any], str]:
    """A second engine on the first one's model, the first in the middle of a window; what the first says then."""
    model = tiny_model(case)
    first = build(case, model)
    run_steps(first, case, 0, 3)
    said = ""
    if ends_the_first:
        first.destroy()
    else:
        first(**batch(case, 3, 0, 0))
    groups = [{"params": list(model.parameters())}]
    engine = ds_agsel.initialize(model=model, model_parameters=groups, config=ds_config(second))[0]
    result = run_steps(engine, second)
    if not ends_the_first:
        with pytest.raises(TrainingError) as refused:
            first(**batch(case, 3, 0, 0))
        said = str(refused.value)
        with torch.no_grad():
            first(**batch(case, 3, 0, 0))
    return {"weights": weights(engine), "losses": result["losses"]}, said


@pytest.mark.parametrize("section", [SELECT, None], ids=["select", "plain"])
@pytest.mark.parametrize("stage, offload", [(1, "none"), (2, "none"), (2, "cpu"), (3, "none")])
def test_a_second_engine_on_the_same_model_takes_it_over(fresh_workers, stage, offload, section):
    case = Case(stage=stage, offload=offload, steps=4)
    second = case.but(section=section, steps=3)
    [(expected, _)] = fresh_workers(1).run(two_engines, case, second, True)
    [(found, said)] = fresh_workers(1).run(two_engines, case, second, False)
    assert_identical(expected, found)
    assert "given to another engine" in said


def adapters_toggled(case: Case) -> list[int]:
    """Parameters that require gradients in each forward, where all are frozen and thawed again before each."""
    engine = build(case)
    seen = []

    def look(*args: Any) -> None:
        seen.append(sum(parameter.requires_grad for parameter in engine.module.parameters()))

    engine.module.model.norm.register_forward_hook(look)
    for step, micro_step in product(range(2), range(2)):
        engine.module.requires_grad_(False)
        with torch.no_grad():
            engine(**batch(case, step, micro_step, 0))
        for parameter in engine.module.parameters():
            parameter.requires_grad = True
        loss = engine(**batch(case, step, micro_step, 0)).loss
        engine.module.requires_grad_(False)
        engine.module.requires_grad_(True)
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return seen[1::2]


@pytest.mark.parametrize("stage", [2, 3])
def test_toggling_within_the_window_does_not_thaw_the_selection(workers, stage):
    section = {"policy": "fixed", "fixed_blocks": ["final_norm"]}
    [seen] = workers(1).run(adapters_toggled, Case(stage=stage, accumulation=2, section=section))
    assert seen == [1] * 4


def plain_config_has_no_window() -> bool:
    model = tiny_model(Case())
    config = ds_config(Case(section=None))
    engine = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    hooked = any(hasattr(module, "ds_agsel_ran") for module in model.modules())
    engine.destroy()
    return hooked


def test_a_plain_engine_is_not_watched(workers):
    assert workers(1).run(plain_config_has_no_window) == [False]


def test_a_run_leaves_no_hook_on_its_model(workers):
    assert workers(1).run(hooks_after_destroy) == [0]


def hooks_after_destroy() -> int:
    model = tiny_model(Case())
    before = _hooks(model)
    engine = build(Case(steps=1), model)
    of_deepspeed = _hooks(model, ours=False) - before
    run_steps(engine, Case(steps=1))
    engine.destroy()
    return _hooks(model) - before - of_deepspeed


def _hooks(model: torch.nn.Module, ours: bool = True) -> int:
    found = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(ours or "ds_agsel" not in getattr(hook, "__module__", "") for hook in found)
