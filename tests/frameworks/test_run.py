"""`python -m ds_agsel.run script.py`, alone and behind the three launchers, on scripts that don't know of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAW = ROOT / "launch" / "examples" / "raw_deepspeed.py"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MODULE = [sys.executable, "-m", "ds_agsel.run"]

pytestmark = pytest.mark.timeout(300)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    settings = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **settings, **environment}, capture_output=True, text=True, timeout=240
    )


def counts(output: str) -> list[int] | None:
    [line] = [line for line in output.splitlines() if line.startswith("update counts:")]
    return json.loads(line.removeprefix("update counts:"))


LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT", "-m"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "PORT", "-m",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "launcher", [name if name == "deepspeed" else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS]
)
def test_an_unchanged_script_selects_behind(launcher):
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    words = [word.replace("PORT", str(free_port())) for word in LAUNCHERS[launcher]]
    done = run([sys.executable, *words, "ds_agsel.run", str(RAW), "--epochs", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = counts(done.stdout)
    assert found is not None and sum(found) == 6 and 0 in found  # 3 steps of 2 blocks, on 2 ranks


def test_without_us_the_same_script_selects_nothing():
    done = run([sys.executable, str(RAW), "--epochs", "1"], **one_rank())
    assert done.returncode == 0, done.stderr[-3000:]
    assert counts(done.stdout) is None


def one_rank() -> dict[str, str]:
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip


SCRIPT = """
import sys
from pathlib import Path
import beside
if __name__ == "__main__":
    print([sys.argv[1:], beside.NAME, __file__ == sys.argv[0], sys.path[0] == str(Path(__file__).resolve().parent)])
    exec(sys.argv[-1])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    ("action", "code", "error"),
    [
        ("pass", 0, "nothing was selected"),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no data')", 1, "no data"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
    ],
)
def test_a_script_runs_as_python_runs_it(script, action, code, error):
    alone = run([sys.executable, str(script), "--a", "b c", action])
    ours = run([*MODULE, str(script), "--a", "b c", action])
    assert ours.returncode == alone.returncode == code
    assert ours.stdout == alone.stdout and "beside" in ours.stdout
    assert error in ours.stderr
    assert ("nothing was selected" in ours.stderr) == (code == 0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ds_agsel.install()", "deepspeed.initialize was not called"),
        ("ds_agsel.install(); ds_agsel.uninstall()", ""),
        ("ds_agsel.install(); ds_agsel.install(); ds_agsel.uninstall()", ""),
        ("ds_agsel.install(); raise ValueError('wrong')", ""),
        ("ds_agsel.installed().__enter__()", ""),
        ("import os; os.environ['RANK'] = '1'; ds_agsel.install()", ""),
    ],
)
def test_a_process_that_never_selected_is_told_at_its_end(code, said):
    done = run([sys.executable, "-c", f"import ds_agsel; {code}"])
    assert ("nothing was selected" in done.stderr) == bool(said) and said in done.stderr, done.stderr


def test_a_plain_engine_under_install_is_told_too():
    """As of an Accelerate plugin made from its own fields, whose ds_config has no section."""
    done = run([sys.executable, "-c", PLAIN], **one_rank())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 1 deepspeed.initialize call(s) none had" in done.stderr


PLAIN = """
import deepspeed, torch, ds_agsel
ds_agsel.install()
model = torch.nn.Linear(2, 2)
config = {"train_batch_size": 1, "optimizer": {"type": "AdamW"}}
deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
"""


def test_training_needs_no_extra(tmp_path):
    done = run([sys.executable, "-c", WITHOUT_EXTRAS, str(tmp_path)], **one_rank())
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "selection.jsonl").read_text().count("\n") == 2


WITHOUT_EXTRAS = """
import sys
for name in ("matplotlib", "jinja2", "rich", "accelerate", "trl", "peft", "tensorboard", "gguf"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from pathlib import Path
import torch, ds_agsel
from ds_agsel.report.log import SelectionLog
model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)]))
model.forward = lambda x: model[0][2](model[0][1](model[0][0](x))).square().mean()
config = {
    "train_batch_size": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2},
    "adagrad_select": {"steps_per_epoch": 2},
}
engine = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
log = SelectionLog(Path(sys.argv[1]), engine.optimizer)
for _ in range(2):
    engine.backward(engine(torch.ones(1, 4)))
    engine.step()
    log.update()
log.close()
"""


def test_the_launchers_local_rank_goes_to_the_script(script):
    done = run([*MODULE, "--local_rank=3", str(script), "pass"])
    assert "[['--local_rank=3', 'pass']" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "no script was named"), (["nothing.py"], "'nothing.py' is not a file"), (["--x", "a.py"], "no script was")],
)
def test_a_missing_script_is_named(words, message):
    done = run([*MODULE, *words])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
