"""The paper's experiments (arXiv:2512.15764), and its neighbours beside it, as one list of runs.

    python launch/reproduce.py --scale tiny             # all of it, small: SmolLM2-135M, built-in data, a CPU
    python launch/reproduce.py --scale small            # evidence: three seeds, differences with intervals, hours
    python launch/reproduce.py --scale gsm8k            # the leading methods on GSM8K, longer: for one GPU, --jobs 8
    python launch/reproduce.py --scale sparse           # a few entries of each matrix, against as many parameters
    python launch/reproduce.py --scale gast             # rows of a batch chosen, with wrong answers among them
    python launch/reproduce.py --scale full --cost      # what the paper's own scale would take on one GPU
    python launch/reproduce.py --scale full             # and that

A scale is a YAML of runs in configs/paper/. First short runs choose each family's learning rate, then every cell
trains through the deepspeed launcher in a process of its own; one that fails is a row that says so. Started again, it
goes on where it was. What comes out below --output: results.json, tables.md, figures/, and each cell's log.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ds_agsel import processor
from ds_agsel.errors import ConfigError
from ds_agsel.estimate import cards
from ds_agsel.files import write_atomically

from ..training.console import outlive_closed_pipes
from . import comparisons, figures, results, running, tables
from . import plan as plans
from .plan import Cell, SweepPlan
from .running import ROOT, Stopped, Sweep

CONFIGS = ROOT / "configs" / "paper"
PUBLISHED = CONFIGS / "published.yaml"
SCALES = ("smoke", "tiny", "small", "small_gsm8k", "gsm8k", "sparse", "gast", "full")
CELLS_FAILED, REFUSED, STOPPED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0; 1 if cells failed unexpectedly, 2 for an impossible setting, 130 after a signal."""
    outlive_closed_pipes()
    wanted = _parse(arguments)
    try:
        if wanted.jobs is not None and wanted.jobs < 1:
            raise ConfigError(f"--jobs={wanted.jobs} is no number of cells to run at once. Use 1 or more.")
        plan = _with_models(plans.read(wanted.file or CONFIGS / f"{wanted.scale}.yaml"), wanted.model)
        if wanted.cost:
            return _show_cost(plan, wanted)
        return _sweep(plan, wanted)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--scale", choices=SCALES, help="a YAML in configs/paper/")
    which.add_argument("--file", type=Path, help="a YAML of your own")
    parser.add_argument("--output", type=Path, help="folder (default: runs/reproduce/SCALE); with --cost a file")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=PATH", help="a model of the YAML, kept here")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells: 'final/*/lora_256/*'")
    parser.add_argument("--retry", action="store_true", help="run cells that failed again")
    parser.add_argument(
        "--jobs", type=int, help="cells at once, instead of the YAML's; on a shared device their seconds tell nothing"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--plan", action="store_true", help="show the cells and their commands, run nothing")
    shown.add_argument("--cost", action="store_true", help="estimate time and memory on one GPU, run nothing")
    shown.add_argument("--report", action="store_true", help="tables and figures of what is there, run nothing")
    return parser.parse_args(arguments)


def _with_models(plan: SweepPlan, named: Sequence[str]) -> SweepPlan:
    models = dict(plan.models)
    for word in named:
        name, _, path = word.partition("=")
        if name not in models or not path:
            raise ConfigError(f"--model {word!r} is not NAME=PATH with a NAME of {', '.join(models)}.")
        shape = models[name].shape or models[name].model
        models[name] = models[name].model_copy(update={"model": path, "shape": shape})
    return plan.model_copy(update={"models": models})


def _show_cost(plan: SweepPlan, wanted: argparse.Namespace) -> int:
    from . import cost

    text = cost.page(plan, f"python launch/reproduce.py {_which(wanted)}")
    if wanted.output is None:
        print(text, end="")
    else:
        wanted.output.write_text(text, encoding="utf-8")
    return 0


def _which(wanted: argparse.Namespace) -> str:
    return f"--scale {wanted.scale}" if wanted.scale else f"--file {shlex.quote(str(wanted.file))}"


def _sweep(plan: SweepPlan, wanted: argparse.Namespace) -> int:
    output = wanted.output or ROOT / "runs" / "reproduce" / plan.name
    sweep = Sweep(plan, output.resolve(), _say, retry=wanted.retry, jobs=wanted.jobs)
    cells = [*plans.search_cells(plan), *plans.final_cells(plan)]
    cells = [cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in wanted.only)]
    if not cells:
        raise ConfigError(f"--only {' '.join(wanted.only)} is the name of no cell. See --plan.")
    todo = [cell for cell in cells if sweep.is_open(cell)]
    if wanted.plan:
        _show_plan(sweep, cells, todo)
        return 0
    stopped = False
    if not wanted.report:
        _say(_announcement(plan, cells, todo))
        began = time.monotonic()
        try:
            sweep.run(cells)
        except Stopped:
            stopped = True
            _say("stopped; start it again to go on")
        _say(f"{(time.monotonic() - began) / 60:.1f} minutes")
    _report(sweep, output)
    if stopped:
        return STOPPED
    return 0 if all(_is_as_known(sweep, cell) for cell in cells) else CELLS_FAILED


def _is_as_known(sweep: Sweep, cell: Cell) -> bool:
    """Return whether ``cell`` is whole, or failed in the way that the plan foresees."""
    outcome, known = sweep.outcome(cell), sweep.plan.methods[cell.method].fails
    if outcome is None or outcome.message is None:
        return outcome is not None
    return known is not None and known in outcome.message


def _announcement(plan: SweepPlan, cells: Sequence[Cell], todo: Sequence[Cell]) -> str:
    seconds = plans.expected_seconds(plan, todo)
    about = "" if seconds is None else f", about {seconds / 60:.0f} minutes on the machine that it is meant for"
    return f"{plan.name}: {len(todo)} of {len(cells)} cells to run{about}"


def _show_plan(sweep: Sweep, cells: Sequence[Cell], todo: Sequence[Cell]) -> None:
    print(_announcement(sweep.plan, cells, todo))
    for cell in cells:
        outcome = sweep.outcome(cell)
        lr = cell.lr or sweep.lr_of(cell)[0]
        words = plans.arguments(sweep.plan, cell if lr is None else replace(cell, lr=lr), lr or float("nan"))
        print(f"{outcome.state if outcome else 'open':<7}{cell.name}")
        print(f"       deepspeed --num_accelerators 1 {running.TRAINER} {shlex.join(words)}")


def _report(sweep: Sweep, output: Path) -> None:
    plan = sweep.plan
    output.mkdir(parents=True, exist_ok=True)
    measured, rates = results.collect(sweep), results.chosen_rates(sweep)
    machine = _machine()
    everything = {
        "plan": plan.model_dump(mode="json"),
        "machine": machine,
        "learning_rates": [
            {"model": model, "family": family, "losses": losses, "chosen": chosen}
            for model, family, losses, chosen in rates
        ],
        "cells": [m.as_dict() for m in measured],
        "comparisons": [c.as_dict() for c in comparisons.compare(plan, measured)],
    }
    write_atomically(output / "results.json", json.dumps(everything, indent=1) + "\n")
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    where = f"{machine['accelerator']}; " if machine["accelerator"] else ""
    said = f"{where}{machine['processor']}, {machine['cores']} cores; " + ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items()
    )
    write_atomically(output / "tables.md", tables.page(plan, measured, rates, published, said))
    drawn = figures.draw_all(plan, measured, output / "figures")
    _say(f"{output / 'tables.md'}, {output / 'results.json'}, {len(drawn)} figures")


def _machine() -> dict[str, Any]:
    from importlib.metadata import version

    described = processor.describe()
    return {
        "accelerator": cards.name_here(),
        "processor": f"{described['name']} ({described['simd']})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
    }


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
