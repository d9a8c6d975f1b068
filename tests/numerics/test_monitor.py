"""DeepSpeed's monitors get the selection as ``AdaGradSelect/...`` scalars, from rank 0."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import Case, build, run_steps

CASE = Case(steps=4)


def train_watched(folder: Path, monitor: str, **settings: Any) -> dict[str, Any]:
    section = {"enabled": True, **(settings or {"output_path": str(folder), "job_name": "job"})}
    case = CASE.but(config={monitor: section, "steps_per_print": 2})
    engine = build(case)
    run_steps(engine, case)
    if monitor == "tensorboard" and engine.global_rank == 0:
        engine.monitor.tb_monitor.summary_writer.close()
    selection = engine.selection
    return {
        "phases": [float(record.phase == "explore") for record in selection.history],
        "blocks": [block.name for block in selection.blocks],
        "counts": [
            [sum(b in record.blocks for record in selection.history[:steps]) for steps in (2, 4)]
            for b in range(len(selection.blocks))
        ],
        "batch": engine.train_batch_size(),
    }


def _check(run: dict[str, Any], read: Any) -> None:
    assert read("AdaGradSelect/explore") == [(run["batch"] * (i + 1), phase) for i, phase in enumerate(run["phases"])]
    assert read("AdaGradSelect/explore_rate")[0][1] == 1.0
    assert all(0 < value < 1 for _, value in read("AdaGradSelect/share_of_parameters"))
    for name, counts in zip(run["blocks"], run["counts"], strict=True):  # every steps_per_print steps
        assert [value for _, value in read(f"AdaGradSelect/block_counts/{name}")] == counts


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_csv_monitor_has_every_step(workers, tmp_path, ranks):
    run = workers(ranks).run(train_watched, tmp_path, "csv_monitor")[0]

    def read(name: str) -> list[tuple[int, float]]:
        with open(tmp_path / "job" / f"{name.replace('/', '_')}.csv", newline="") as file:
            return [(int(step), float(value)) for step, value in list(csv.reader(file))[1:]]

    _check(run, read)


def test_tensorboard_has_every_step(workers, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = workers(1).run(train_watched, tmp_path, "tensorboard")[0]
    events = accumulator.EventAccumulator(str(tmp_path / "job"))
    events.Reload()
    _check(run, lambda name: [(event.step, event.value) for event in events.Scalars(name)])


def train_with_a_service(monitor: str) -> dict[str, Any]:
    """What DeepSpeed's own monitor hands to W&B's or Comet's package, here one that keeps it."""
    events: list[tuple[str, int, float]] = []

    def keep(data: dict[str, float], step: int, commit: Any = None) -> None:
        events.extend((name, step, value) for name, value in data.items())

    experiment = SimpleNamespace(
        __internal_api__log_metric__=lambda name, value, step: events.append((name, step, value)),
        set_name=lambda name: None,
    )
    modules = {
        "wandb": SimpleNamespace(init=lambda **_: None, log=keep),
        "comet": SimpleNamespace(start=lambda **_: experiment, __version__="3.58.0"),
    }
    settings = {"wandb": {"project": "p"}, "comet": {"project": "p", "samples_log_interval": 1}}[monitor]
    name = {"wandb": "wandb", "comet": "comet_ml"}[monitor]
    before = sys.modules.get(name)
    sys.modules[name] = modules[monitor]  # type: ignore[assignment]
    try:
        return {**train_watched(Path(), monitor, **settings), "events": events}
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@pytest.mark.parametrize("monitor", ["wandb", "comet"])
def test_a_service_has_every_step(workers, monitor):
    [run] = workers(1).run(train_with_a_service, monitor)
    _check(run, lambda wanted: [(step, value) for name, step, value in run["events"] if name == wanted])
    steps = [step for _, step, _ in run["events"]]
    assert steps == sorted(steps)  # W&B drops what comes for a step before its last
