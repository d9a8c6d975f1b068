"""Run cells: each in its own process, with a log, a time limit, and a mark only once it is complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_agsel.files import write_atomically

from . import plan as plans
from .plan import Cell, Evaluation, SweepPlan

ROOT = Path(__file__).resolve().parents[2]
TRAINER, EVALUATOR = "launch/peers.py", "launch/evaluate.py"
DONE, FAILED, BEGUN = "done.json", "failed.json", "begun.json"
LOG, RUN, EVALUATIONS = "log.txt", "run", "evaluations"
_GRACE_SECONDS = 20  # between asking a process to end and ending it
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(?:error: .+|[\w.]*(?:Error|Exception|Interrupt)\b.*)$")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell. ``message`` is None if it is complete."""

    state: Literal["done", "failed"]
    lr: float
    message: str | None
    seconds: float
    arguments: tuple[str, ...]


class Stopped(Exception):
    """The sweep was stopped; the cell that was running has no mark, and the next sweep runs it again."""


class Sweep:
    """The cells of a plan below one output folder."""

    def __init__(
        self,
        plan: SweepPlan,
        output: Path,
        say: Callable[[str], None],
        *,
        retry: bool = False,
        jobs: int | None = None,
    ) -> None:
        self.plan, self.output, self.retry, self.jobs = plan, output, retry, jobs or plan.jobs
        self._say = say
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()
        self._counting = threading.Lock()
        self._count = 0

    # -- what is there

    def folder(self, cell: Cell) -> Path:
        """Return the folder of ``cell``."""
        return self.output / cell.name

    def outcome(self, cell: Cell) -> Outcome | None:
        """Return the outcome of ``cell``.

        None if its run is not complete, had other settings, or has no learning rate yet.
        """
        found = _read_json(self.folder(cell) / DONE) or _read_json(self.folder(cell) / FAILED)
        if found is None:
            return None
        outcome = Outcome(**{**found, "arguments": tuple(found["arguments"])})
        wanted = cell.lr if cell.kind == "search" else self.lr_of(cell)[0]
        if wanted != outcome.lr or outcome.arguments != self._fingerprint(cell, outcome.lr):
            return None
        return outcome

    def lr_of(self, cell: Cell) -> tuple[float | None, str]:
        """Return a final cell's learning rate and, if it is None, the reason: None until its family's search ends."""
        rates = self.plan.families[cell.family].learning_rates
        if len(rates) == 1:
            return rates[0], ""
        losses = self.search_losses(cell.model, cell.family)
        if len(losses) < len(rates):
            return None, "its learning rates were not all tried"
        chosen = plans.choose_lr(losses)
        return chosen, "" if chosen is not None else self._search_message(cell.model, cell.family)

    def search_losses(self, model: str, family: str) -> dict[float, float | None]:
        """Return the held-out loss at the end of each short run that was tried; None for one that failed."""
        losses: dict[float, float | None] = {}
        for cell in plans.search_cells(self.plan):
            if (cell.model, cell.family) == (model, family) and (outcome := self.outcome(cell)) is not None:
                losses[float(cell.lr or 0)] = last_loss(self.folder(cell) / RUN) if outcome.state == "done" else None
        return losses

    def _search_message(self, model: str, family: str) -> str:
        cells = [c for c in plans.search_cells(self.plan) if (c.model, c.family) == (model, family)]
        messages = [outcome.message for cell in cells if (outcome := self.outcome(cell)) and outcome.message]
        return messages[0] if messages else "no short run gave a finite held-out loss"

    def is_open(self, cell: Cell) -> bool:
        """Return whether ``cell`` still needs to be run."""
        outcome = self.outcome(cell)
        return outcome is None or (self.retry and outcome.state == "failed")

    def _fingerprint(self, cell: Cell, lr: float) -> tuple[str, ...]:
        evaluations = self.plan.evaluations if cell.kind == "final" else ()
        extra = [word for evaluation in evaluations for word in plans.evaluation_arguments(evaluation)]
        return (*plans.arguments(self.plan, cell, lr), *extra)

    # -- running

    def run(self, cells: Sequence[Cell]) -> None:
        """Run those of ``cells`` that are open: short runs first, then final ones. Raises Stopped."""
        todo = [cell for cell in cells if self.is_open(cell)]
        total, self._count = len(todo), 0
        search = [cell for cell in todo if cell.kind == "search"]
        jobs = max(self.jobs, self.plan.search.jobs if self.plan.search is not None else 1)
        with _interruptible(self.stop):
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda cell: self._run(cell, cell.lr, total), search))
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(lambda cell: self._run_final(cell, total), (c for c in todo if c.kind == "final")))
        if self._stopping.is_set():
            raise Stopped

    def stop(self) -> None:
        """End all processes, from any thread; no further cell is begun."""
        self._stopping.set()
        for process in list(self._processes):
            _end(process, _GRACE_SECONDS)

    def _run_final(self, cell: Cell, total: int) -> None:
        lr, why = self.lr_of(cell)
        if lr is None:
            self._pass_over(f"{cell.name}: not run, {why}")
        elif not self.is_open(cell):
            self._pass_over(f"{cell.name}: its learning rate was chosen again, {lr:g}")
        else:
            self._run(cell, lr, total)

    def _pass_over(self, message: str) -> None:
        with self._counting:
            self._count += 1
        self._say(message)

    def _run(self, cell: Cell, lr: float | None, total: int) -> None:
        if self._stopping.is_set() or lr is None:
            return
        folder = self.folder(cell)
        fingerprint = self._fingerprint(cell, lr)
        goes_on = _read_json(folder / BEGUN) == list(fingerprint)
        if not goes_on:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_atomically(folder / BEGUN, json.dumps(fingerprint) + "\n")
        for name in (DONE, FAILED):
            (folder / name).unlink(missing_ok=True)
        began = time.monotonic()
        message = self._train_and_evaluate(cell, lr)
        if self._stopping.is_set():
            return
        seconds = time.monotonic() - began
        state: Literal["done", "failed"] = "done" if message is None else "failed"
        outcome = Outcome(state, lr, message, seconds, fingerprint)
        if state == "done":
            shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)
            if cell.kind == "search" or not self.plan.keep_models:
                shutil.rmtree(folder / RUN / "model", ignore_errors=True)
        write_atomically(folder / (DONE if state == "done" else FAILED), json.dumps(vars(outcome), indent=1) + "\n")
        with self._counting:
            self._count += 1
            number = self._count
        what = f"held-out loss {last_loss(folder / RUN)}" if message is None else f"FAILED: {message}"
        self._say(f"[{number}/{total}] {cell.name}, lr {lr:g}: {what} ({seconds:.0f} s)")

    def _train_and_evaluate(self, cell: Cell, lr: float) -> str | None:
        """Finish what an earlier sweep began; return the error, or None."""
        folder = self.folder(cell)
        run = folder / RUN
        limit = time.monotonic() + self.plan.time_limit_seconds
        threads = 1 if self.jobs > 1 else None
        if self.plan.search is not None and cell.kind == "search":
            threads = self.plan.search.threads or threads
        message = None
        with open(folder / LOG, "ab") as log:
            if not ((run / "summary.json").is_file() and (run / "model").is_dir()):
                treat = "--resume" if (run / "checkpoints" / "latest").is_file() else "--overwrite"
                shutil.rmtree(folder / EVALUATIONS, ignore_errors=True)
                message = self._call(self._training(cell, lr, treat), log, limit, threads)
            if message is None and last_loss(run) is None:
                message = "the run ended without a finite held-out loss"
            for evaluation in self.plan.evaluations if cell.kind == "final" else ():
                if message is None:
                    message = self._call(self._evaluating(cell, evaluation), log, limit, threads)
        return message

    def _training(self, cell: Cell, lr: float, treat: str) -> list[str]:
        return [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--master_port", _free_port(),
            TRAINER, *plans.arguments(self.plan, cell, lr), "--output", str(self.folder(cell) / RUN), treat,
        ]  # fmt: skip

    def _evaluating(self, cell: Cell, evaluation: Evaluation) -> list[str]:
        folder = self.folder(cell)
        output = folder / EVALUATIONS / evaluation.dataset.replace("/", "_")
        words = plans.evaluation_arguments(evaluation)
        return [
            sys.executable, EVALUATOR, *words, "--model", str(folder / RUN / "model"), "--output", str(output),
            "--resume",
        ]  # fmt: skip

    def _call(self, command: Sequence[str], log: Any, limit: float, threads: int | None) -> str | None:
        """Run ``command`` with its output in ``log``; None after exit code 0, else what went wrong."""
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        self._processes.add(process)
        try:
            if self._stopping.is_set():  # set between the check in _run and here
                _end(process, 0)
            code = process.wait(max(1.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process, _GRACE_SECONDS)
            return f"stopped at the time limit of {self.plan.time_limit_seconds:g} s"
        finally:
            _end(process, 0)
            self._processes.discard(process)
        if code == 0:
            return None
        with open(log.name, "rb") as written:
            written.seek(start)
            return error_in(written.read().decode(errors="replace")) or f"exit code {code}, and no error in the log"


def error_in(log: str) -> str | None:
    """Return the line of ``log`` with the error: the last that begins with "error:", else the last exception."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if _ERROR.fullmatch(line) and "CalledProcessError" not in line]
    named = [line for line in errors if line.startswith("error: ")]
    return (named or errors)[-1].removeprefix("error: ") if errors else None


def last_loss(run: Path) -> float | None:
    """Return the last validation loss in the run's metrics; None if it is missing or not finite."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            record = json.loads(line)
            if record["event"] == "validation":
                loss = record["loss"]
                return loss if loss is not None and math.isfinite(loss) else None
    return None


def _read_json(path: Path) -> Any:
    """Return the file's content; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End the process and all that it started: its group, which it leads. Saving a checkpoint takes its grace."""
    if grace_seconds:
        _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and _signal_group(process, 0):
            time.sleep(0.1)
    _signal_group(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Return whether a process received the signal; signal 0 only checks."""
    process.poll()  # a leader that has ended counts as there until it is waited for
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call ``stop`` once instead of ending this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: threading.Thread(target=stop, daemon=True).start())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
