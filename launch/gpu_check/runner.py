"""Runs parts in processes with time limits, and goes on after what fails, hangs or dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parts import Part

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """What a part gave.

    Attributes:
        outcome: "ok", "failed", "out of time" or "not started".
        cases: a dict for each case, with its ``case`` and ``outcome``.
        data: what a command of its own wrote into its result file.
    """

    part: Part
    outcome: str = "not started"
    seconds: float = 0.0
    cases: list[dict[str, Any]] = field(default_factory=list)
    data: Any = None
    tail: str = ""


def run(part: Part, folder: Path, size_name: str, limit_seconds: float) -> Result:
    """Run ``part`` for at most ``limit_seconds``; its output goes to FOLDER/NAME.log."""
    started = time.monotonic()
    deadline = started + limit_seconds
    result = _run_command(part, folder, deadline) if part.command else _run_cases(part, folder, size_name, deadline)
    result.seconds = time.monotonic() - started
    log = folder / f"{part.name}.log"
    result.tail = log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.exists() else ""
    (folder / f"{part.name}.json").write_text(
        json.dumps({"outcome": result.outcome, "seconds": result.seconds, "cases": result.cases, "data": result.data},
                   indent=1) + "\n", encoding="utf-8")  # fmt: skip
    return result


def _run_command(part: Part, folder: Path, deadline: float) -> Result:
    code = _process(list(part.command), folder / f"{part.name}.log", deadline)
    result = Result(part, "out of time" if code is None else "ok" if code in (0, 5) else "failed")  # 5: no test chosen
    if part.result_file is not None:
        with contextlib.suppress(OSError, ValueError):
            result.data = json.loads((folder / part.result_file).read_text(encoding="utf-8"))
    return result


def _run_cases(part: Part, folder: Path, size_name: str, deadline: float) -> Result:
    """Run the part's worker until no case is left; one that kills the worker is noted, and the rest go on."""
    lines, now = folder / f"{part.name}.jsonl", folder / f"{part.name}.now"
    left = list(part.cases)
    died: list[dict[str, Any]] = []
    outcome = "ok"
    while left and outcome == "ok":
        command = [sys.executable, "-m", f"{__package__}.worker", part.name, str(folder), size_name, *left]
        code = _process(command, folder / f"{part.name}.log", deadline)
        done = {line["case"] for line in _read(lines)}
        left = [case for case in left if case not in done]
        if code is None:
            outcome = "out of time"
        elif left:
            dead = now.read_text(encoding="utf-8") if now.exists() else left[0]
            died.append({"case": dead, "outcome": "failed", "reason": f"the process ended with code {code}"})
            left = [case for case in left if case != dead]
    now.unlink(missing_ok=True)
    cases = _read(lines) + died + [{"case": case, "outcome": "out of time"} for case in left]
    if outcome == "ok" and any(case["outcome"] == "failed" for case in cases):
        outcome = "failed"
    return Result(part, outcome, cases=cases)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _process(command: list[str], log: Path, deadline: float) -> int | None:
    """Return the exit code of ``command``; None if it was killed, with all it had started, at the deadline."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(log, "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
