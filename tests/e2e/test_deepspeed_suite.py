"""`make deepspeed-suite` on a small suite that starts its processes as DeepSpeed's does: by forkserver and pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[1] / "deepspeed_suite" / "run.py"
HELPER = """
import multiprocessing, os, tempfile
import deepspeed, torch

MODEL = lambda: torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

def names(store):
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    deepspeed.init_distributed("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    found = []
    for zero in [{"stage": 1}, {"stage": 2}, {"stage": 0}, {"stage": 2, "elastic_checkpoint": True}]:
        config = {
            "train_batch_size": 1, "zero_optimization": zero,
            "optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}},
        }
        model = MODEL()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        found.append(type(engine).__name__)
    return found

class Distributed:
    def __call__(self):
        multiprocessing.set_start_method("forkserver", force=True)
        with tempfile.NamedTemporaryFile() as store, multiprocessing.Pool(1) as pool:
            return pool.apply(self.names, (store.name,))

    def names(self, store):
        return names(store)
"""
TESTS = """
import pytest
from unit.helper import Distributed

@pytest.fixture(scope="module")
def names():
    return Distributed()()

def test_trains(names):
    assert len(names) == 4

@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_is_deepspeeds_own(names, number):
    assert names[number] == "DeepSpeedEngine"

def test_left_out():
    pytest.skip("not here")
"""


def run(tests: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), "--tests", str(tests), "--output", str(output), *options, "unit/test_fake.py"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_it_reaches_started_processes_counts_engines_and_gates_on_outcomes(tmp_path):
    tests = tmp_path / "tests"
    (tests / "unit").mkdir(parents=True)
    (tests / "conftest.py").touch()
    (tests / "unit" / "__init__.py").touch()
    (tests / "unit" / "helper.py").write_text(HELPER)
    (tests / "unit" / "test_fake.py").write_text(TESTS)
    engines = tmp_path / "engines.csv"
    engines.write_text("file,policy,engaged\nunit/test_fake.py,cyclic,2\n")
    expected = tmp_path / "expected.csv"
    expected.write_text(
        "test,policy,outcome,reason\n"
        "unit/test_fake.py::test_is_deepspeeds_own[0],*,failed,ds_agsel's engine has another class\n"
    )

    done = run(
        tests, tmp_path / "output", "--expected", str(expected), "--engines", str(engines),
        "--section", '{"policy": "cyclic", "select_percent": 50}',
    )  # fmt: skip

    found = json.loads((tmp_path / "output" / "cyclic.json").read_text())
    assert found["engaged"] == {"unit/test_fake.py": 2}, done.stdout
    assert "engines 2 engaged, 1 plain, 1 refused" in done.stdout
    assert "refused 1 times: zero_optimization.elastic_checkpoint=true" in done.stdout
    assert found["plain"]["unit/test_fake.py::test_left_out"] == "skipped"
    assert found["plain"]["unit/test_fake.py::test_is_deepspeeds_own[0]"] == "passed"
    assert done.returncode == 1
    assert "test_is_deepspeeds_own[1]: failed through ds_agsel, passed in plain DeepSpeed" in done.stdout
    assert "test_is_deepspeeds_own[0]: " not in done.stdout and "own[2]: " not in done.stdout
