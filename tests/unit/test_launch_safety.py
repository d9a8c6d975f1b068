"""What launch/train.py must not do: remove files that are not its own, lose a save, train with NaN, or hang."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_agsel.errors import ConfigError
from ds_agsel.zero import build_ops
from launch.training import options
from launch.training.folder import RunFolder

ROOT = Path(__file__).parents[2]
OURS = '{"event": "train", "step": 0}\n'


def asked(folder: Path, *, overwrite: bool) -> argparse.Namespace:
    return argparse.Namespace(output=str(folder), overwrite=overwrite, resume=False)


@pytest.mark.parametrize("metrics", [None, '{"loss": 1}\n', "step,loss\n", "[]\n"])
def test_overwrite_removes_nothing_where_no_run_of_ours_was(tmp_path: Path, metrics: str | None) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.bin").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(ConfigError, match=r"holds model, checkpoints.* Use another folder"):
        RunFolder(tmp_path).prepare(asked(tmp_path, overwrite=True))
    assert (tmp_path / "model" / "mine.bin").read_text() == "precious" and (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize(
    "mark",
    [
        ("metrics.jsonl", OURS),
        ("metrics.jsonl", ""),  # it was stopped before its first record
        ("summary.json", '{"method": "full", "deepspeed_config": "x.json", "rows_per_step": 8}'),
    ],
)
def test_overwrite_removes_a_run_and_leaves_what_is_beside_it(tmp_path: Path, mark: tuple[str, str]) -> None:
    (tmp_path / mark[0]).write_text(mark[1])
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"holds an earlier run\. Use --resume"):
        RunFolder(tmp_path).prepare(asked(tmp_path, overwrite=False))
    RunFolder(tmp_path).prepare(asked(tmp_path, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "notes.txt"]


@pytest.mark.parametrize("words", ["--lr nan", "--lr inf", "--lr 0", "--epochs nan", "--epochs inf", "--epochs -1"])
def test_what_is_no_positive_number_is_refused(words: str) -> None:
    given = ["--deepspeed_config", "c.json", "--model", "m", "--output", "o", *words.split()]
    name, value = words.split()
    with pytest.raises(ConfigError, match=rf"{name}={float(value)} is outside \(0, inf\)"):
        options.parse(given)


@pytest.mark.parametrize("script", ["train.py", "peers.py", "evaluate.py"])
def test_help_and_version_load_no_framework(script: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["{script}", sys.argv[1]]
try:
    runpy.run_path("launch/{script}", run_name="__main__")
except SystemExit as left:
    assert not left.code, left.code
assert not {{"torch", "deepspeed", "transformers", "datasets"}} & set(sys.modules)
"""
    for word, said in (("--help", "--model"), ("--version", "ds_agsel 0.")):
        done = subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_what_is_printed_after_the_reader_has_gone_is_dropped(tmp_path: Path) -> None:
    code = """
import sys
from launch.training.console import outlive_closed_pipes, say
outlive_closed_pipes()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    say("nobody reads this")
    print("nor this", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("saved")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "saved")], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("command", ["reproduction", "evaluation", "benchmarking", "gpu_check"])
def test_commands_of_hours_outlive_the_reader_of_their_output(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"launch.{command}.command")
    monkeypatch.setattr(sys, "argv", ["command", "--no-such-option"])
    kept = sys.stdout, sys.stderr
    try:
        with pytest.raises(SystemExit):
            module.main()
        assert type(sys.stdout).__name__ == type(sys.stderr).__name__ == "_Surviving"
    finally:
        sys.stdout, sys.stderr = kept


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an op's build folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    return lock


def test_a_stale_build_lock_is_named_and_removed(lock: Path) -> None:
    said: list[str] = []
    os.utime(lock, (0, time.time() - 1000))
    build_ops.announce(["cpu_adam"], said.append)
    assert not lock.exists() and f"removed {lock}" in said[0] and "compiles cpu_adam now" in said[1]


def test_the_lock_of_a_build_that_goes_on_is_waited_for(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    os.utime(lock, (0, time.time() - 1000))
    monkeypatch.setattr(build_ops, "_PATIENCE_SECONDS", -1.0)
    with contextlib.ExitStack() as open_files:
        open_files.enter_context(open(lock))

        def built(_: float) -> None:
            open_files.close()
            lock.rename(lock.with_name("cpu_adam.so"))

        monkeypatch.setattr(build_ops.time, "sleep", built)
        build_ops.announce(["cpu_adam"], said.append)
    assert len(said) == 1 and f"waiting for process {os.getpid()}, which compiles cpu_adam" in said[0]


def test_ops_that_are_about_to_be_compiled_are_told(lock: Path) -> None:
    said: list[str] = []
    lock.rename(lock.with_name("cpu_adam.so"))
    build_ops.announce(["cpu_adam", "fused_adam"], said.append)
    assert len(said) == 1 and "compiles fused_adam now: one to two minutes" in said[0]
