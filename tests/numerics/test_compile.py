"""torch.compile, layer by layer: the same training, few graphs; the whole model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, assert_identical, build, finish, run_steps, tiny_model

import ds_agsel
from ds_agsel.errors import ConfigError

CASE = Case(section={"policy": "random", "select_percent": 60, "never_select": ["model.layers.2"]}, steps=12)


def train(compiled: bool) -> dict[str, Any]:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = build(CASE)
    start = {name: tensor.detach().clone() for name, tensor in engine.module.named_parameters()}
    if compiled:
        engine.compile(backend="aot_eager")  # graphs as with inductor, without its minutes of C++
        engine.compile(backend="aot_eager")  # again: nothing
    graphs = []
    result = run_steps(engine, CASE, observe=lambda event, *_: graphs.append(_graphs()) if event == "step" else None)
    never = engine.selection.blocks[3]
    assert never.name == "model.layers.2"
    for name in never.parameter_names:
        assert torch.equal(start[name], dict(engine.module.named_parameters())[name])
    return {**finish(engine, result), "graphs": graphs, "is_compiled": engine.is_compiled}


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_layer_by_layer_trains_alike_in_few_graphs(fresh_workers):
    [eager] = fresh_workers(1).run(train, False)
    [compiled] = fresh_workers(1).run(train, True, timeout_seconds=300)
    assert eager["graphs"][-1] == 0 and not eager["is_compiled"]
    assert compiled["history"] == eager["history"]
    patterns = {blocks for _, _, blocks in compiled["history"]}
    # A graph for layers that train, one for frozen ones, each with an input that requires gradients or not, and one
    # for evaluation: what counts is that it does not grow with the patterns.
    assert 1 <= compiled["graphs"][-1] <= 5 < len(patterns)
    for name, tensor in eager["weights"].items():
        torch.testing.assert_close(compiled["weights"][name], tensor, rtol=1e-3, atol=1e-5)


def refusals() -> list[str]:
    messages = []
    model = tiny_model(CASE)
    in_place = tiny_model(CASE)
    in_place.compile()
    engine = build(CASE)
    for attempt in (
        lambda: build(CASE, torch.compile(model)),
        lambda: build(CASE, in_place),
        lambda: engine.compile(compiled_autograd_enabled=True),
        lambda: engine.compile(schedule=[(0, [])]),
    ):
        with pytest.raises(ConfigError) as refused:
            attempt()
        messages.append(str(refused.value))
    return messages


def test_the_whole_model_is_refused(workers):
    [messages] = workers(1).run(refusals)
    assert all("compiled as a whole" in message and "engine.compile()" in message for message in messages[:2])
    assert all("one graph of all blocks" in message for message in messages[2:])


def test_a_disabled_section_leaves_the_whole_model_alone(workers):
    assert_identical(*[run["weights"] for run in workers(1).run(plain_whole)[0]])


def plain_whole() -> list[dict[str, Any]]:
    """Steps of DeepSpeed's own engine, made by it and by us with a disabled section, compiled as a whole."""
    import deepspeed
    from support import ds_config

    results = []
    for initialize in (deepspeed.initialize, ds_agsel.initialize):
        torch._dynamo.reset()
        model = torch.compile(tiny_model(CASE), backend="eager")
        config = {**ds_config(CASE), "adagrad_select": {"enabled": False}}
        engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        assert not hasattr(engine, "selection")
        results.append(finish(engine, run_steps(engine, CASE.but(steps=2))))
    return results
