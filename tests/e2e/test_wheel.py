"""The wheel in an environment of its own, away from the clone: init, check, train five steps, evaluate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import tiny_model  # noqa: F401  # the fixture

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of a new environment that has the wheel and what it needs, from an index.

    DS_AGSEL_WHEEL_VENV names an environment in which torch and the other requirements are already.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves its own folders behind
    for name in ("ds_agsel", "launch"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)],
        check=True,
    )
    [wheel] = folder.glob("*.whl")
    given = os.environ.get("DS_AGSEL_WHEEL_VENV")
    venv = Path(given) if given else folder / "venv"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    if not given:
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([*pip, *constraints, "torch"], check=True)
        subprocess.run([*pip, *constraints, f"{wheel}[evaluate]", "ninja"], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return venv / "bin"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "TORCH_EXTENSIONS_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"TORCH_EXTENSIONS_DIR": str(installed.parent / "torch_extensions")}
    return subprocess.run(
        [str(installed / words[0]), *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200
    )


def test_init_check_train_and_evaluate_without_a_clone(
    installed: Path,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    where = run(installed, tmp_path, "python", "-c", "import ds_agsel.launch.training as t; print(t.__file__)")
    assert where.returncode == 0 and str(ROOT) not in where.stdout, where.stderr
    assert run(installed, tmp_path, "ds-agsel", "init").returncode == 0
    checked = run(installed, tmp_path, "ds-agsel", "check", "ds_config.json")
    assert checked.returncode == 0 and "sound" in checked.stdout, checked.stdout + checked.stderr
    trained = run(
        installed, tmp_path, "ds-agsel", "train", "--deepspeed_config", "ds_config.json", "--num_accelerators", "1",
        "--model", str(tiny_model), "--dataset", "builtin", "--steps", "5", "--train-rows", "80",
        "--validation-rows", "8", "--test-rows", "4", "--max-new-tokens", "4", "--output", "run",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout[-2000:] + trained.stderr[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 5 and summary["steps_of"]["step_seconds"] == [0, 4]
    evaluated = run(
        installed, tmp_path, "ds-agsel", "evaluate", "--model", "run/model", "--rows", "4", "--max-new-tokens", "4",
        "--output", "run/accuracy",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stdout[-2000:] + evaluated.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "accuracy" / "accuracy.json").read_text())["dataset"] == "builtin"


def test_help_says_how_it_is_started(installed: Path, tmp_path: Path) -> None:
    assert "usage: ds-agsel train" in run(installed, tmp_path, "ds-agsel", "train", "--help").stdout
    assert "usage: ds-agsel evaluate" in run(installed, tmp_path, "ds-agsel", "evaluate", "--help").stdout


def test_what_needs_a_clone_says_so(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "python", "-m", "ds_agsel.launch.reproduce", "--scale", "tiny")
    assert done.returncode == 2 and "needs a clone" in done.stderr
