"""Read a run's logs from its folder, also while it runs or if they are damaged. Standard library only."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_agsel.errors import DataError
from ds_agsel.report.matrices import MATRICES_FILE, Matrix, read_matrices
from ds_agsel.report.rows import Choice, read_choices
from ds_agsel.report.text import printable

BLOCKS_FILE = "blocks.json"
SELECTION_FILE = "selection.jsonl"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TRAINER_STATE_FILE = "trainer_state.json"
ADAM_BYTES_PER_ELEMENT = 8  # exp_avg and exp_avg_sq, fp32: the paper's 2 · P · 4
MAX_BLOCKS = 4096  # where blocks.json does not say how many there are
MAX_NUMBER = 1e100  # in a log; a sum or a scale of larger ones overflows
MAX_STEP = 2**53  # above, a float has no place for each
MAX_PROBLEMS = 100  # that are kept; the rest is counted
PARTS = ("forward", "backward", "step")
# Traffic of gradients follows the blocks that got one, that of weights the blocks that were updated.
GRADIENT_TRAFFIC = ("reduced_bytes", "d2h_bytes")
SELECTED_TRAFFIC = ("h2d_bytes", "gathered_bytes", "nvme_read_bytes", "nvme_written_bytes")  # of weights, of states


@dataclass(frozen=True)
class Step:
    """A line of selection.jsonl. What comes after ``explore_rate`` is rank 0's, and may lack; ``choices`` are of rows.

    ``accelerator_state_bytes``: moments on the accelerator when the step had ended.
    """

    step: int
    phase: str
    blocks: tuple[int, ...]
    explore_rate: float | None = None
    traffic: Mapping[str, int] = field(default_factory=dict)
    state_bytes: int | None = None
    accelerator_state_bytes: int | None = None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A training line of metrics.jsonl; what it lacks is None. ``seconds`` is the wall time of one step."""

    step: int
    loss: float | None
    seconds: float | None
    phase: str | None
    parts: Mapping[str, float]
    lr: float | None = None


@dataclass
class Run:
    """Everything that could be read of a run, its texts `printable`. ``problems`` names the rest."""

    name: str
    folder: Path
    block_names: list[str] = field(default_factory=list)
    block_numels: list[int] | None = None
    policy: str | None = None
    select_percent: float | None = None
    ranks: int = 1
    steps: list[Step] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)  # of which some entries are trained
    summary: dict[str, Any] | None = None
    changed: float | None = None  # when its logs were last written, seconds since the epoch
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def problem(self, name: str, what: str) -> None:
        """Note that ``what`` is wrong in the log ``name``; the first MAX_PROBLEMS are kept, the others counted."""
        self.num_problems += 1
        if self.num_problems <= MAX_PROBLEMS:
            self.problems.append(printable(f"{self.folder / name}{what}"))
        else:
            more = self.num_problems - MAX_PROBLEMS
            self.problems[MAX_PROBLEMS:] = [printable(f"{self.folder}: {more} problems more")]

    @property
    def is_finished(self) -> bool:
        """Whether its summary was written."""
        return self.summary is not None

    def counts(self, phase: str | None = None) -> list[int]:
        """Return how many steps (of ``phase``) updated each block."""
        counts = [0] * len(self.block_names)
        for step in self.steps:
            if phase is None or step.phase == phase:
                for block in step.blocks:
                    counts[block] += 1
        return counts

    @property
    def choices(self) -> list[Choice]:
        """Which rows the blocks took, in all steps; empty without `adagrad_select.gast`."""
        return [choice for step in self.steps for choice in step.choices]

    def num_steps(self, phase: str) -> int:
        """Return the number of steps of ``phase``."""
        return sum(step.phase == phase for step in self.steps)

    def selected_numel(self) -> list[int] | None:
        """Return the parameters updated by each step; None if the blocks' sizes are not known."""
        if self.block_numels is None:
            return None
        return [sum(self.block_numels[block] for block in step.blocks) for step in self.steps]

    def share_of_parameters(self) -> float | None:
        """Return the mean share of the parameters that a step updated."""
        selected = self.selected_numel()
        if not selected or not self.block_numels or not sum(self.block_numels):
            return None
        return statistics.fmean(selected) / sum(self.block_numels)

    def state_bytes(self) -> dict[str, float] | None:
        """Return the bytes of Adam's moments on a rank, by how they are found.

        ``full``: the rank's share of full fine-tuning's; ``formula``: its share by the paper's formula for a mean step;
        ``measured``: on rank 0 at the end, for all blocks updated so far; ``on_card``: the most that was on its
        accelerator when a step had ended (both absent in older logs).
        """
        selected = self.selected_numel()
        if not selected or self.block_numels is None or not sum(self.block_numels):
            return None
        found = {
            "full": ADAM_BYTES_PER_ELEMENT * sum(self.block_numels) / self.ranks,
            "formula": ADAM_BYTES_PER_ELEMENT * statistics.fmean(selected) / self.ranks,
        }
        if self.steps[-1].state_bytes is not None:
            found["measured"] = float(self.steps[-1].state_bytes)
        on_card = [step.accelerator_state_bytes for step in self.steps if step.accelerator_state_bytes is not None]
        if on_card:
            found["on_card"] = float(max(on_card))
        return found

    def traffic(self) -> dict[str, tuple[float, float]] | None:
        """Return, by kind, rank 0's mean measured bytes per step and what full fine-tuning would move.

        The latter is computed from this run's bytes per element. None if nothing was logged; kinds that moved nothing
        are left out.
        """
        selected = self.selected_numel()
        logged = [(step, numel) for step, numel in zip(self.steps, selected or []) if step.traffic]
        if not logged or self.block_numels is None:
            return None
        total = sum(self.block_numels)
        found = {}
        for kind in (*GRADIENT_TRAFFIC, *SELECTED_TRAFFIC):
            moved = [step.traffic.get(kind, 0) for step, _ in logged]
            elements = [
                total if kind in GRADIENT_TRAFFIC and step.phase == "explore" else numel for step, numel in logged
            ]
            if sum(moved) > 0 and sum(elements) > 0:
                found[kind] = (statistics.fmean(moved), sum(moved) / sum(elements) * total)
        return found

    def step_seconds(self) -> dict[str, dict[str, float]]:
        """Return phase -> median seconds of a step, and of its parts if they were logged."""
        found: dict[str, dict[str, float]] = {}
        phases = {step.step: step.phase for step in self.steps}
        by_phase: dict[str, list[Measured]] = {}
        for line in self.measured:
            if line.seconds is not None:
                by_phase.setdefault(line.phase or phases.get(line.step, "step"), []).append(line)
        for phase, lines in by_phase.items():
            found[phase] = {"all": statistics.median(line.seconds for line in lines if line.seconds is not None)}
            for part in PARTS:
                seconds = [line.parts[part] for line in lines if part in line.parts]
                if seconds:
                    found[phase][part] = statistics.median(seconds)
        return found

    def wall_seconds(self) -> list[tuple[float, float]]:
        """Return (seconds so far, loss) of each training line; steps between two lines took the second's time."""
        points, clock, before = [], 0.0, -1
        for line in self.measured:
            if line.seconds is None:
                return []
            clock += line.seconds * max(1, line.step - before)
            before = line.step
            if line.loss is not None:
                points.append((clock, line.loss))
        return points


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Return the run in ``folder``, written by launch/train.py, `SelectionCallback` or any HF Trainer.

    Raises DataError, naming the folder and the remedy, where no log is there at all.
    """
    folder = Path(folder)
    run = Run(printable(name or folder.resolve().name), folder)
    described = _read_blocks(run)
    found = [_read_selection(run), _read_metrics(run)]
    if not found[1]:
        found.append(_read_trainer_state(run))
    if not any(found):
        what = "is not a folder" if not folder.is_dir() else f"has no {SELECTION_FILE}, {METRICS_FILE}"
        raise DataError(
            f"{folder} {what}: not a run. Give the --output of launch/train.py, or the output_dir of a Trainer with "
            "ds_agsel.hf.SelectionCallback."
        )
    if not described:
        num_blocks = 1 + max((max(step.blocks, default=-1) for step in run.steps), default=-1)
        run.block_names = [f"block {index}" for index in range(num_blocks)]
    run.changed = _last_change(folder)
    text = _read_text(run, MATRICES_FILE)
    matrices = None if text is None else _parse(run, MATRICES_FILE, text)
    if matrices is not None:
        try:
            run.matrices = read_matrices(matrices)
        except ValueError as error:
            run.problem(MATRICES_FILE, f": {error}")
    text = _read_text(run, SUMMARY_FILE)
    if text is not None:
        run.summary = _parse(run, SUMMARY_FILE, text)
    return run


def _last_change(folder: Path) -> float | None:
    times = []
    for name in (SELECTION_FILE, METRICS_FILE):
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times, default=None)


def _read_selection(run: Run) -> bool:
    by_step: dict[int, Step] = {}
    num_blocks = len(run.block_names) or MAX_BLOCKS
    whose = f"that {BLOCKS_FILE} names" if run.block_names else "that a log without blocks.json can have"

    def take(line: dict[str, Any]) -> None:
        blocks = line["blocks"]
        if not isinstance(blocks, list) or any(type(block) is not int or block < 0 for block in blocks):
            raise ValueError(f'"blocks" is {blocks!r:.80}, not a list of indices')
        if max(blocks, default=0) >= num_blocks:
            raise ValueError(f"block {max(blocks)} is not one of the {num_blocks} {whose}")
        step = _step(line)
        if line["phase"] not in ("explore", "exploit"):
            raise ValueError(f"step {step} with phase {line['phase']!r:.80}")
        rate, traffic = number(line.get("explore_rate")), line.get("traffic")
        held = {name: number(line.get(name)) for name in ("state_bytes", "accelerator_state_bytes")}
        by_step[step] = Step(
            step,
            line["phase"],
            tuple(dict.fromkeys(blocks)),
            rate,
            {kind: value for kind, value in traffic.items() if (number(value) or 0) > 0}
            if isinstance(traffic, dict)
            else {},
            choices=read_choices(line.get("samples"), num_blocks),
            **{name: int(value) for name, value in held.items() if value is not None},
        )

    there = _read_lines(run, SELECTION_FILE, take)
    run.steps = [by_step[step] for step in sorted(by_step)]
    return there


def _read_metrics(run: Run) -> bool:
    by_step: dict[int, Measured] = {}
    validation: dict[int, float] = {}

    def take(line: dict[str, Any]) -> None:
        step, event, phase = _step(line), line["event"], line.get("phase")
        if phase is not None and not isinstance(phase, str):
            raise ValueError(f'"phase" is {phase!r:.80}, not a text')
        loss = number(line.get("loss"))
        if event == "train":
            parts = {part: number(line.get(f"{part}_seconds")) for part in PARTS}
            by_step[step] = Measured(
                step,
                loss,
                number(line.get("seconds")),
                None if phase is None else printable(phase),
                {part: value for part, value in parts.items() if value is not None},
                number(line.get("lr")),
            )
        elif event == "validation" and loss is not None:
            validation[step] = loss

    there = _read_lines(run, METRICS_FILE, take)
    run.measured = [by_step[step] for step in sorted(by_step)]
    run.validation = sorted(validation.items())
    return there


def _read_trainer_state(run: Run) -> bool:
    """Read the losses in the newest checkpoint's log_history, for a Trainer that had no SelectionCallback."""
    states = sorted(run.folder.glob(f"checkpoint-*/{TRAINER_STATE_FILE}"), key=lambda path: path.stat().st_mtime)
    if not states:
        return False
    name = str(states[-1].relative_to(run.folder))
    text = _read_text(run, name)
    state = None if text is None else _parse(run, name, text)
    history = (state or {}).get("log_history", [])
    for line in history if isinstance(history, list) else []:
        step: Any = line.get("step") if isinstance(line, dict) else None
        if not _is_step(step):
            continue
        if (loss := number(line.get("loss"))) is not None:
            run.measured.append(Measured(step - 1, loss, None, None, {}, number(line.get("learning_rate"))))
        if (value := number(line.get("eval_loss"))) is not None:
            run.validation.append((step, value))
    return state is not None


def _read_blocks(run: Run) -> bool:
    """Read blocks.json; return False if it is missing or can't be used."""
    text = _read_text(run, BLOCKS_FILE)
    described = None if text is None else _parse(run, BLOCKS_FILE, text)
    if described is None:
        return False
    try:
        blocks = [(printable(str(block["name"])), block["numel"]) for block in described["blocks"]]
        wrong = [numel for _, numel in blocks if type(numel) is not int or not 0 <= numel < MAX_STEP]
        if wrong or not blocks:
            raise ValueError(f'"numel" is {wrong[0]!r:.80}' if wrong else "it names no block")
    except (KeyError, TypeError, ValueError) as error:
        run.problem(BLOCKS_FILE, f": {_why(error)}; blocks are shown by their indices")
        return False
    run.block_names, run.block_numels = [name for name, _ in blocks], [numel for _, numel in blocks]
    policy = described.get("policy")
    run.policy = printable(policy) if isinstance(policy, str) else None
    run.select_percent = number(described.get("select_percent"))
    run.ranks = max(1, int(number(described.get("ranks")) or 1))
    return True


def _read_lines(run: Run, name: str, take: Callable[[dict[str, Any]], None]) -> bool:
    """Give each line of a log to ``take``; a line that can't be read or taken is a problem. False: no such file."""
    text = _read_text(run, name)
    if text is None:
        return False
    for number, line in _numbered(text):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            take(record)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            last = number == text.count("\n") + 1
            why = "half-written" if last and isinstance(error, json.JSONDecodeError) else _why(error)
            run.problem(name, f", line {number}: {why}")
    return True


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _read_text(run: Run, name: str) -> str | None:
    try:
        return (run.folder / name).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        run.problem(name, f": {error.strerror}")
        return None


def _parse(run: Run, name: str, text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        run.problem(name, ": not an object")
    except (ValueError, RecursionError) as error:
        run.problem(name, f": {_why(error)}")
    return None


def _step(line: Mapping[str, Any]) -> int:
    step = line["step"]
    if not _is_step(step):
        raise ValueError(f'"step" is {step!r:.80}, not a step\'s number')
    return int(step)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_STEP


def number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if abs(float(value)) < MAX_NUMBER else None  # NaN is not
    except OverflowError:  # an integer beyond every float
        return None


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
