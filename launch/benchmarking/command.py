"""Measure what ds_agsel saves and costs: against plain DeepSpeed, and against the least that any code must do.

    python launch/benchmark.py                      # everything, SmolLM2-135M's shape, ZeRO-2 with and without offload
    python launch/benchmark.py --stage 2 3          # and ZeRO-3
    python launch/benchmark.py --offload cpu --rows exploit-20 floor-20 --steps 4
    python launch/benchmark.py --together           # all rows of a round in one process, for ratios of time
    python launch/benchmark.py --bars               # what the number of selected parameters, blocks and units costs
    python launch/benchmark.py --rows exploit-20 all random-20 align-20 random-all align-all   # GAST
    python launch/benchmark.py --rows exploit-20 all sparse-20 sparse-all                      # SparseGrad

Rows: `plain` DeepSpeed; `exploit-P` and `explore-P`, ds_agsel's two kinds of steps at P %; `visit-20`, exploit steps
whose states visit the accelerator (ZeRO-2 without offload), while those of all other rows stay where they are; `all`,
ds_agsel with every block selected; `floor-20`, a hand-written PyTorch loop on the blocks that `exploit-20` drew.
`modules-3` are exploit steps at 3 % of the matrices; `layers-20` and `matrices-20` update the same random layers, as
blocks and matrix by matrix; these three are measured where they are named, and with ``--bars``, which measures what a
bar of the optimizer's phase hangs on, on few tokens, so that fixed costs weigh most: ten minutes or more on two cores.
`random-20` and `align-20` are `exploit-20` learning from half of the batch's rows, drawn at random and by GAST's
alignment, `random-all` and `align-all` are `all`; they are measured where they are named. All rows take their steps in
turn, one at a time: a round is one step of each on the same batch, and every second round goes through them backwards.
Ratios are taken within a round and their median over the rounds is reported, so that the machine's noise cancels.

Each row lives in a process of its own, whose peak of memory is the row's. But equal work takes up to a third longer in
one process than in another. With ``--together``, which ``--bars`` implies, the rows that are measured together live in
one process: their times can be compared, and no peak of memory is reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

import ds_agsel
from ds_agsel import processor

from ..training import hardware
from ..training.console import outlive_closed_pipes
from . import processes, report
from .processes import Shape, Workload
from .rows import (
    ALL,
    FLOOR,
    FLOOR_PERCENT,
    GAST_ROWS,
    LAYERS,
    MATRICES,
    MODULES,
    NAMED_ROWS,
    PERCENTAGES,
    PLAIN,
    UNIT_ROWS,
    VISIT,
    exploit_row,
    explore_row,
)

FOLLOWED = exploit_row(FLOOR_PERCENT)  # the floor updates the blocks that this row draws
# Which rows are in memory together. Plain DeepSpeed takes part in all rounds.
EXPLOIT_GROUP = (PLAIN, exploit_row(10), FOLLOWED, FLOOR, exploit_row(30), ALL, *NAMED_ROWS)
EXPLORE_GROUP = (PLAIN, *(explore_row(percent) for percent in PERCENTAGES), VISIT)
UNIT_GROUP = (PLAIN, *UNIT_ROWS)
ROWS = tuple(dict.fromkeys(EXPLOIT_GROUP + EXPLORE_GROUP + UNIT_GROUP))
DEFAULT_ROWS = tuple(row for row in ROWS if row not in NAMED_ROWS and row not in UNIT_ROWS)
GROUPS = (EXPLOIT_GROUP, EXPLORE_GROUP, UNIT_GROUP)
# With ``--bars`` at most three engines are in memory: 8 GB.
BAR_GROUPS = (
    (PLAIN, exploit_row(10), exploit_row(20)),
    (PLAIN, exploit_row(30), MODULES),
    (PLAIN, ALL),
    (PLAIN, LAYERS, MATRICES),
)
# What ``--bars`` sets, where the command line does not.
BARS = {
    "stage": [2, 3],
    "rows": list(dict.fromkeys(itertools.chain(*BAR_GROUPS))),
    "together": True,
    "steps": 4,
    "micro_batch": 1,
    "sequence_length": 128,
}
WARMUP_STEPS = 2
# Imported once, by the fork server: most of a row's start. The last two are imported late by those who use them.
PRELOADED = (
    processes.__name__,
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
)
BARS_MISSED = 1
FAILED = 2


class RowFailed(Exception):
    """A row's process raised or died."""


class RowsProcess:
    """A process of one row or of several, which works only while `step` waits for it.

    Attributes:
        block_numels: elements of each block.
        planned_blocks: by row, the blocks of its next step; None where they are not known before it.
    """

    def __init__(self, rows: Sequence[str], workload: Workload, log: Path) -> None:
        self.planned_blocks: dict[str, list[int] | None] = {}
        self._rows = rows
        self._log = log
        self._connection, theirs = Pipe()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._process = context.Process(target=processes.serve, args=(theirs, rows, workload, log), daemon=True)
        self._process.start()
        theirs.close()
        for row in rows:  # all have the same model
            self.block_numels: list[int] = self._receive(row)["block_numels"]

    def step(self, row: str, batch: int, blocks: Sequence[int] | None) -> dict[str, Any]:
        """Let ``row`` take a step on batch number ``batch``. ``blocks`` is what the floor updates; None: all."""
        self._send(row, (row, batch, blocks))
        measured = self._receive(row)
        self.planned_blocks[row] = measured.get("planned_blocks")
        return measured

    def start_measuring(self) -> None:
        """Tell the process that the warm-up of its rows is over."""
        self._send(self._rows[0], processes.RESET)

    def stop(self) -> None:
        """End the process; do nothing if it has ended."""
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def _send(self, row: str, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._failure(row, "its process is gone") from None

    def _receive(self, row: str) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            what = f"its process ended with code {code}, where -9 means too little memory"
            raise self._failure(row, what) from None
        if "error" in message:
            raise self._failure(row, message["error"])
        return message

    def _failure(self, row: str, what: str) -> RowFailed:
        return RowFailed(f"row {row}: {what}. Its output is in {self._log}.")


@contextmanager
def row_processes() -> Iterator[dict[str, RowsProcess]]:
    """Give a dict for rows' processes, which end with the ``with`` block."""
    processes: dict[str, RowsProcess] = {}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.stop()


@dataclass(frozen=True)
class Measurement:
    """Samples by row and round, and the numel of each block."""

    samples: dict[str, dict[int, dict[str, Any]]]
    block_numels: list[int]


def measure(
    workload: Workload,
    rows: Sequence[str],
    steps: int,
    logs: Path,
    groups: Sequence[Sequence[str]] = GROUPS,
    together: bool = False,
) -> Measurement:
    """Measure ``steps`` rounds of each of ``groups``, the rows that are in memory together, as far as in ``rows``.

    ``together``: each group is in a process of its own, not each row.
    """
    if workload.stage == 3 or workload.offload != "none":
        rows = [row for row in rows if row != VISIT]
    samples: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in rows}
    first_round = 0
    block_numels: list[int] = []
    with row_processes() as processes:
        for group in groups:
            names = [row for row in group if row in rows]
            if names == [PLAIN] and len(rows) > 1:
                continue
            _change_rows(processes, names, workload, logs, together)
            block_numels = processes[PLAIN].block_numels
            for number in range(first_round - WARMUP_STEPS, first_round + steps):
                measured = _round(processes, names, number)
                if number == first_round - 1:
                    for process in set(processes.values()):
                        process.start_measuring()
                if number >= first_round:
                    for row, sample in measured.items():
                        samples[row][number] = sample
                seconds = ", ".join(f"{row} {report.step_seconds(measured[row]):.2f}" for row in names)
                kind = "warm-up" if number < first_round else f"round {number - first_round + 1}/{steps}"
                _say(f"{workload.mode}: {kind}: {seconds}")
            first_round += steps + WARMUP_STEPS
        return Measurement(samples, block_numels)


def _change_rows(
    processes: dict[str, RowsProcess], names: Sequence[str], workload: Workload, logs: Path, together: bool
) -> None:
    """Make ``processes`` those of ``names``: end the others, and start what is missing.

    With ``together`` all start anew, in one process: ZeRO-3 does not free an engine's memory before its process ends.
    """
    for row in [row for row in processes if together or row not in names]:
        processes.pop(row).stop()
    missing = [row for row in names if row not in processes]
    for rows in [missing] if together else [[row] for row in missing]:
        _say(f"{workload.mode}: starting {', '.join(rows)}")
        log = logs / f"zero{workload.stage}-{workload.offload}-{'+'.join(rows)}.log"
        processes.update(dict.fromkeys(rows, RowsProcess(rows, workload, log)))


def _round(processes: Mapping[str, RowsProcess], names: Sequence[str], number: int) -> dict[str, dict[str, Any]]:
    """Take one step of each row, in alternating order, so that no row always follows the same one."""
    followed = processes[FOLLOWED].planned_blocks.get(FOLLOWED) if FLOOR in names else None
    order = names if number % 2 == 0 else list(reversed(names))
    batch = number + WARMUP_STEPS
    return {row: processes[row].step(row, batch, followed if row == FLOOR else None) for row in order}


def machine(threads: int) -> dict[str, Any]:
    """Return the facts that the numbers depend on."""
    modules = (ds_agsel, deepspeed, torch, transformers)
    return {
        "processor": processor.describe(),
        "bf16_is_fast": hardware.bf16_is_fast(),
        "accelerator": get_accelerator().device_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in modules},
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", type=int, choices=(2, 3), default=[2], help="ZeRO's (default: 2)")
    parser.add_argument("--offload", nargs="+", choices=("none", "cpu"), default=["none", "cpu"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(DEFAULT_ROWS), help="plain is always measured")
    parser.add_argument(
        "--together", action="store_true", help="rows share a process: times that can be compared, no peak of memory"
    )
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each row (default: 8)")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"),
        help="default: bf16, or fp32 on a CPU without instructions for bf16, where it measures an emulation",
    )  # fmt: skip
    parser.add_argument("--micro-batch", type=int, help="default: 4, or 2 on a CPU without bf16")
    parser.add_argument("--sequence-length", type=int, help="default: 256, or 128 on a CPU without bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help=f"exit with code {BARS_MISSED} where a bar is missed")
    parser.add_argument("--bars", action="store_true", help="the rows of the optimizer's phase, in all modes")
    if parser.parse_known_args(arguments)[0].bars:
        parser.set_defaults(**BARS)
    wanted = parser.parse_args(arguments)
    wanted.rows = [row for row in ROWS if row in wanted.rows or row == PLAIN]
    if FLOOR in wanted.rows and FOLLOWED not in wanted.rows:
        parser.error(f"--rows {FLOOR} needs {FOLLOWED}, whose blocks it updates. Add {FOLLOWED}.")
    for row in wanted.rows:
        base = NAMED_ROWS.get(row, PLAIN)
        if base not in wanted.rows:
            parser.error(f"--rows {row} needs {base}, which it is compared with. Add {base}.")
    small = not hardware.bf16_is_fast()
    wanted.precision = wanted.precision or ("fp32" if small else "bf16")
    wanted.micro_batch = wanted.micro_batch or (2 if small else 4)
    wanted.sequence_length = wanted.sequence_length or (128 if small else 256)
    if wanted.micro_batch == 1 and set(GAST_ROWS) & set(wanted.rows):
        parser.error("--micro-batch=1 leaves the rows of GAST no choice. Use 2 or more.")
    for name in ("steps", "micro_batch", "sequence_length", "threads"):
        if getattr(wanted, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(wanted, name)} is not 1 or more.")
    return wanted


def run(wanted: argparse.Namespace) -> dict[str, Any]:
    """Measure every stage and offload mode in turn and print as each ends; all numbers as one JSON-able dict."""
    os.environ.update(OMP_NUM_THREADS=str(wanted.threads), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    logs = wanted.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shape = Shape(**{name: getattr(wanted, name) for name in asdict(Shape())})
    modes = {}
    for stage, offload in itertools.product(wanted.stage, wanted.offload):
        workload = Workload(
            shape, wanted.micro_batch, wanted.sequence_length, wanted.precision, offload, wanted.seed, stage
        )
        groups = BAR_GROUPS if wanted.bars else GROUPS
        measured = measure(workload, wanted.rows, wanted.steps, logs, groups, wanted.together)
        samples, numels = measured.samples, measured.block_numels
        rows = report.summarize(samples, numels, wanted.micro_batch * wanted.sequence_length)
        judged = report.bars(samples, numels, workload)
        print(report.table(workload.mode, rows))
        print(report.bar_table(workload.mode, judged), flush=True)
        modes[offload if stage == 2 else f"zero3-{offload}"] = {
            "rows": rows,
            "bars": [bar.as_dict() for bar in judged],
            "samples": {
                row: [{"round": number, **sample} for number, sample in by_round.items()]
                for row, by_round in samples.items()
            },
        }
    return {
        "machine": machine(wanted.threads),
        "workload": {
            "shape": asdict(shape),
            "parameters": sum(numels),
            "block_numels": numels,
            "micro_batch": wanted.micro_batch,
            "sequence_length": wanted.sequence_length,
            "precision": wanted.precision,
            "zero_stages": wanted.stage,
            "rows_share_a_process": wanted.together,
            "gradient_clipping": processes.CLIPPING,
            "warmup_steps": WARMUP_STEPS,
            "steps": wanted.steps,
        },
        "offload": modes,
    }


def main() -> int:
    """Return 0; 1 if a bar is missed with ``--check``; 2 if a row failed."""
    outlive_closed_pipes()
    wanted = parse()
    if wanted.precision != "bf16":
        _say(f"note: the bars were set for bf16; this run is in {wanted.precision}.")
    elif not hardware.bf16_is_fast():
        _say("note: this processor emulates bf16: forward and backward are many times slower than in fp32.")
    try:
        results = run(wanted)
    except RowFailed as error:
        _say(f"error: {error}")
        return FAILED
    path = wanted.output / "benchmark.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    described = results["machine"]["processor"]
    print(f"\n{described['name']}, {described['simd']}, {wanted.threads} threads, {wanted.precision}, ", end="")
    print(f"{wanted.micro_batch} x {wanted.sequence_length} tokens, {wanted.steps} rounds. All numbers: {path}")
    missed = [bar for mode in results["offload"].values() for bar in mode["bars"] if not bar["met"]]
    return BARS_MISSED if wanted.check and missed else 0
