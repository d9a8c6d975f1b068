"""`ds_agsel.initialize`: the ds_config in every form, and the caller's own things left as they are."""

from __future__ import annotations

import base64
import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    BETAS,
    EPS,
    LEARNING_RATE,
    SELECT,
    WEIGHT_DECAY,
    Case,
    assert_identical,
    ds_config,
    finish,
    param_groups,
    run_steps,
    tiny_model,
    train,
)

FORMS = ("config", "config_params", "path", "base64", "args")


def train_in_every_form(case: Case, directory: Path) -> dict[str, dict[str, Any]]:
    import ds_agsel

    results = {}
    for form in FORMS:
        config = ds_config(case)
        before, text = copy.deepcopy(config), json.dumps(config)
        path = directory / f"{torch.distributed.get_rank()}.json"
        path.write_text(text)
        arguments: dict[str, Any] = {
            "config": {"config": config},
            "config_params": {"config_params": config},
            "path": {"config": str(path)},
            "base64": {"config": base64.urlsafe_b64encode(text.encode()).decode()},
            "args": {"args": Namespace(deepspeed_config=str(path))},
        }[form]
        model = tiny_model(case)
        engine = ds_agsel.initialize(model=model, model_parameters=param_groups(model, case), **arguments)[0]
        results[form] = finish(engine, run_steps(engine, case))
        assert_identical(before, config)
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_config_may_come_in_any_form(workers, tmp_path, ranks):
    case = Case(steps=2)
    for expected, results in zip(
        workers(ranks).run(train, case), workers(ranks).run(train_in_every_form, case, tmp_path), strict=True
    ):
        for form in FORMS:
            for key in ("weights", "partitions", "history", "blocks"):
                assert_identical(expected[key], results[form][key])


def train_with_changes_by_hand(case: Case, kind: str) -> dict[str, Any]:
    """A run in which the script changes hyperparameters of its own optimizer after the second step."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    import ds_agsel

    make = {"AdamW": torch.optim.AdamW, "DeepSpeedCPUAdam": DeepSpeedCPUAdam, "FusedAdam": FusedAdam}[kind]
    model = tiny_model(case)
    config = ds_config(case)
    del config["optimizer"]
    optimizer = make(param_groups(model, case), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    before = described(optimizer)
    engine = ds_agsel.initialize(model=model, optimizer=optimizer, config=config)[0]
    run_steps(engine, case, 0, 2)
    unedited = described(optimizer) == before
    optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), weight_decay=0.25)
    run_steps(engine, case, 2, 3)
    decays = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    split = [
        (id(members[0]) in decays, group["lr"], tuple(group["betas"]), group["weight_decay"])
        for members, group in zip(engine.optimizer.bit16_groups, engine.optimizer.param_groups, strict=True)
    ]
    engine.destroy()
    return {"unedited": unedited, "split": split}


def described(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": [id(parameter) for parameter in group["params"]]} for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("kind", "offload"), [("AdamW", "none"), ("AdamW", "cpu"), ("DeepSpeedCPUAdam", "cpu"), ("FusedAdam", "none")]
)
def test_what_the_script_changes_in_its_groups_reaches_the_split_ones_and_nothing_else_is_edited(
    workers, kind, offload
):
    case = Case(offload=offload, decay_groups=True, steps=3)
    for result in workers(1).run(train_with_changes_by_hand, case, kind):
        assert result["unedited"]
        assert {decays for decays, *_ in result["split"]} == {True, False}
        for decays, *values in result["split"]:
            kept = [LEARNING_RATE, BETAS, WEIGHT_DECAY / 10]
            assert values == ([0.5, (0.5, 0.6), 0.25] if decays else kept)


def plan_from_training_data(case: Case, rows: int) -> list[Any]:
    import ds_agsel

    section = {key: value for key, value in SELECT.items() if key not in ("steps_per_epoch", "explore_decay")}
    data = torch.utils.data.TensorDataset(torch.zeros(rows, 8, dtype=torch.int64))
    engine, _, loader, _ = ds_agsel.initialize(
        model=tiny_model(case), config=ds_config(case.but(section=section)), training_data=data
    )
    policy = engine.selection.policy
    rates = [policy.explore_probability(step) for step in range(20)]
    engine.destroy()
    return [len(loader), rates]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_is_as_long_as_the_training_data(workers, ranks):
    """12 optimizer steps of 2 micro-batches of 2 rows: ε is 0 from step 12 on, and ends epoch 1 at 1 %."""
    for loader_length, rates in workers(ranks).run(plan_from_training_data, Case(accumulation=2), 48 * ranks):
        assert loader_length == 24
        assert rates[0] == 1.0 and rates[11] == pytest.approx(0.01 ** (11 / 12))
        assert not any(rates[12:])


def replay_a_run(case: Case, path: Path) -> dict[str, Any]:
    """``case``, whose optimizer lacks the embedding, and a run that replays its selections."""
    first = train_without_embedding(case)
    if torch.distributed.get_rank() == 0:
        history = [*first["history"], (case.steps, "exploit", [1])]  # what comes after the last step is planned too
        lines = [json.dumps(dict(zip(("step", "phase", "blocks"), record, strict=True))) for record in history]
        path.write_text("\n".join(lines) + "\n")
    torch.distributed.barrier()
    section = {"policy": "replay", "replay_file": str(path)}
    return {"first": first, "again": train_without_embedding(case.but(section=section))}


def train_without_embedding(case: Case) -> dict[str, Any]:
    import ds_agsel

    model = tiny_model(case)
    embedding = model.get_input_embeddings().weight
    engine = ds_agsel.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p is not embedding], config=ds_config(case)
    )[0]
    return finish(engine, run_steps(engine, case))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_can_be_replayed_though_the_optimizer_lacks_a_block(workers, tmp_path, ranks):
    """selection.jsonl has the model's block indices, whatever stands outside the lottery."""
    for runs in workers(ranks).run(replay_a_run, Case(steps=5), tmp_path / "selection.jsonl"):
        first, again = runs["first"], runs["again"]
        assert [blocks for *_, blocks in again["history"]] == [blocks for *_, blocks in first["history"]]
        assert first["counts"][0] == again["counts"][0] == 0
        assert_identical(first["weights"], again["weights"])
