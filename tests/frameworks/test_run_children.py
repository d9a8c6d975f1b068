"""`python -m ds_agsel.run` reaches modules, the processes that a script starts, and ds_configs without a section."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_run import MODULE, counts, one_rank, run

pytestmark = pytest.mark.timeout(300)

TRAINS = """
import deepspeed, torch
model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)]))
model.forward = lambda x: model[0][2](model[0][1](model[0][0](x))).square().mean()
config = {"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}SECTION}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, training_data=[1, 2])[0]
for _ in range(2):
    engine.backward(engine(torch.ones(1, 4)))
    engine.step()
selection = getattr(engine, "selection", None)
print("update counts:" + ("" if selection is None else str(list(selection.update_counts))))
"""
SECTION = ', "adagrad_select": {"steps_per_epoch": 2}'
STARTS_A_CHILD = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, sys.argv[1]]))"


@pytest.fixture
def trains(tmp_path: Path) -> Path:
    path = tmp_path / "trains.py"
    path.write_text(TRAINS.replace("SECTION", SECTION))
    return path


def test_a_process_that_the_script_starts_selects(trains: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(STARTS_A_CHILD)
    (tmp_path / "sitecustomize.py").write_text("print('the other one ran')")
    done = run([*MODULE, str(parent), str(trains)], **one_rank(), PYTHONPATH=f"{Path.cwd()}:{tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(counts(done.stdout) or []) == 2
    assert "the other one ran" in done.stdout
    assert "nothing was selected" not in done.stderr


@pytest.mark.slow
def test_a_child_of_another_program_is_left_alone(trains: Path) -> None:
    done = run([sys.executable, str(trains)], **one_rank())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "update counts:\n" in done.stdout


def test_a_module_runs_and_selects(trains: Path) -> None:
    done = run([*MODULE, "-m", "trains"], cwd=trains.parent, **one_rank())
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(counts(done.stdout) or []) == 2


def test_select_percent_adds_a_section_to_ds_configs_that_have_none(trains: Path) -> None:
    trains.write_text(TRAINS.replace("SECTION", ""))
    done = run([*MODULE, "--select-percent", "34", str(trains)], **one_rank())
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(counts(done.stdout) or []) == 2
    assert "--select-percent=34.0 adds one" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--select-percent", "0", "a.py"], "--select-percent='0' is outside (0, 100]"),
        (["--select-percent"], "--select-percent='' is outside (0, 100]"),
        (["-m"], "no module was named"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str) -> None:
    done = run([*MODULE, *words])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
