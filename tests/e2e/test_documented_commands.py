"""What README.md, CONTRIBUTING.md and docs/ tell a user to type works as it stands there.

Every line of every block is sorted: it is run here (`RUN`), run in the slow sweep (`SLOW`), or held by another test
(`ELSEWHERE`). A line that is in none of them fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("make", "deepspeed", "python", "ds-agsel", "accelerate", "torchrun", "pip")

# By a part of the line: who shows that it works.
ELSEWHERE = {
    "make": "test_makefile_has_the_target",
    "pip install": "the wheel's own test",
    "python -m venv": "Python's own",
    "--hostfile": "make test-nodes",
    "ds_agsel.run train.py": "tests/frameworks/test_run.py",
    "launch/reproduce.py": "tests/e2e/test_reproduce.py",
    "launch.pages.gast": "tests/e2e/test_gast_job.py",
    "launch/peers.py": "tests/e2e/test_peers.py",
    "launch/evaluate.py": "tests/e2e/test_evaluate.py",
    "launch/benchmark.py": "tests/e2e/test_benchmark.py",
    "launch/train.py": "tests/e2e/test_train.py",
    "docs/selective_training": "tests/numerics or tests/unit of the page",
    "ds_to_universal": "tests/numerics/test_travel.py",
    "zero_to_fp32.py": "tests/numerics/test_travel.py",
    "ds-agsel train": "tests/e2e/test_wheel.py",
    "ds-agsel fit": "tests/unit/test_fit_command.py",
    "ds-agsel init": "tests/e2e/test_wheel.py",
    "ds-agsel evaluate": "tests/e2e/test_evaluate.py",
    "ds-agsel universal": "tests/numerics/test_universal.py",
    "ds-agsel report": "tests/unit/test_report.py",
    "ds-agsel watch": "tests/unit/test_report.py",
}
RUN = ("ds-agsel check", "ds-agsel estimate")


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    """(page, text) of each fenced block of ``kind``; "" is one without a language."""
    for page in PAGES:
        for found in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if found[1] == kind:
                yield page.name, found[2]


def commands() -> list[str]:
    """Each command line once, continued lines joined, without its comment."""
    found: dict[str, None] = {}
    for _, text in [*blocks(""), *blocks("bash"), *blocks("sh")]:
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*", "", line).strip()
            if line.split(" ")[0] in COMMANDS:
                found[" ".join(line.split())] = None
    return list(found)


def environment(**more: str) -> dict[str, str]:
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in drop}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, **more}


def run(words: list[str], cwd: Path = ROOT, **more: str) -> str:
    done = subprocess.run(words, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_every_line_is_run_somewhere() -> None:
    left = [line for line in commands() if not line.startswith(RUN) and not any(part in line for part in ELSEWHERE)]
    assert not left, "run these in a test, and name it in ELSEWHERE"


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_makefile_has_the_target(line: str) -> None:
    target = shlex.split(line)[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith(RUN)])
def test_a_command_of_ours_works(line: str, tmp_path: Path) -> None:
    words = ["-m", "ds_agsel.cli", *shlex.split(line)[1:]]
    words = [str(ROOT / "configs" / "zero2.json") if word in ("FILE", "ds_config.json") else word for word in words]
    assert run([sys.executable, *words])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_json_blocks_are_sound_sections(page: Path) -> None:
    from ds_agsel.config import find_section, parse_section

    for name, text in blocks("json"):
        if name == page.name:
            section = find_section(json.loads(text))
            assert section is not None and parse_section(section)


TEN_LINES_NEED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, use_cache=False))
rows = torch.randint(0, 32, (6, 8))
dataset = [{"input_ids": row, "labels": row} for row in rows]
"""


@pytest.mark.timeout(300)
def test_the_readme_s_lines_run_by_plain_python(tmp_path: Path) -> None:
    """With its section in a ds_config; the model and the data are all that is put before them."""
    [code] = [text for page, text in blocks("python") if page == "README.md" and "ds_agsel.initialize" in text]
    [section] = [json.loads(text) for page, text in blocks("json") if page == "README.md"]
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}, **section}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    (tmp_path / "script.py").write_text(TEN_LINES_NEED + code)
    counts = run([sys.executable, "script.py"], cwd=tmp_path).strip().splitlines()[-1]
    assert sum(int(number) for number in re.findall(r"\d+", counts)) == 3  # 3 steps of a block


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--main_process_port", "PORT"],
        pytest.param(["deepspeed.launcher.runner", "--master_port", "PORT"], marks=pytest.mark.slow),
    ],
    ids=["accelerate", "deepspeed"],
)
def test_the_accelerate_example_runs_under_both_launchers(launcher: list[str]) -> None:
    words = [word.replace("PORT", free_port()) for word in launcher]
    output = run([sys.executable, "-m", *words, "launch/examples/accelerate_loop.py", "--epochs", "1"])
    assert "update counts: [" in output
