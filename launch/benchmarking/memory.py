"""Peak resident memory of real engines on a CPU, beside the estimate: python -m launch.benchmarking.memory.

Each configuration trains a model of SmolLM2-135M's shape, random weights, in a process of its own. What it held before
the model was made, once a tiny one has been trained so that all libraries are there, is subtracted. On a CPU the
accelerator's memory and the host's are one, so the estimate is the sum of both, at the largest of the steps that were
taken. The estimate is of the moment when backward has ended: it is compared with what was resident then, before the
step's first moments are made, and with the peak of whole steps, which has these moments and what an update takes for a
while. Rows are short, so that activations, which the estimate leaves out, are small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..texts import markdown_head, markdown_row

MIB = 2**20
NEAR = 0.10  # the largest difference that counts as agreement
STEPS, TOKENS = 6, 16
SECTION = {"policy": "adagrad_select", "select_percent": 20, "seed": 1, "steps_per_epoch": STEPS}
# Name: stage, offload_optimizer, fields of the section beside `SECTION`.
CONFIGURATIONS: Mapping[str, tuple[int, str, Mapping[str, Any]]] = {
    "ZeRO-2, states on the accelerator": (2, "none", {}),
    "ZeRO-2, offload": (2, "cpu", {}),
    "ZeRO-2, offload, state_dtype bf16": (2, "cpu", {"state_dtype": "bf16"}),
    "ZeRO-2, states visit": (2, "none", {"step_device": "accelerator"}),
    "ZeRO-1, offload, all blocks": (1, "cpu", {"policy": "all"}),
    "ZeRO-3, offload": (3, "cpu", {}),
}
_ENVIRONMENT = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # glibc gives a tensor's memory back when it is freed, not when it sees fit
}  # fmt: skip
_HEADINGS = (
    "configuration",
    *("resident after backward, MiB", "estimated", "ratio"),
    *("peak, MiB", "estimated", "ratio"),
)


def measure(name: str) -> dict[str, int]:
    """Train the configuration ``name`` in this process; return the measured and the estimated bytes."""
    import ds_agsel
    from ds_agsel.config import parse_section
    from ds_agsel.estimate.setup import read_setup
    from ds_agsel.estimate.shapes import read_shape
    from ds_agsel.estimate.table import with_section

    from ..training.costs import peak_resident_bytes, reset_peak_resident
    from .processes import Shape, Workload, connect_alone

    stage, offload, fields = CONFIGURATIONS[name]
    workload = Workload(Shape(), 1, TOKENS, "bf16", offload, seed=0, stage=stage)
    tiny = replace(workload, shape=Shape(64, 128, 4, 4, 2, 512))
    config = {**workload.ds_config(), "adagrad_select": {**SECTION, **fields}}
    setup = with_section(read_setup(config), parse_section(config["adagrad_select"]))
    connect_alone()

    def engine_of(work: Workload) -> Any:
        model = work.model()
        return ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    warm = engine_of(tiny)
    _train(warm, tiny)
    warm.destroy()
    before = _resident_bytes()
    engine = engine_of(workload)
    shape = read_shape("smollm2")
    reset_peak_resident()
    resident = [held - before for held in _train(engine, workload)]
    estimates = list(_estimates(shape, setup, engine.selection, fields))
    return {
        "after_backward": max(resident),
        "after_backward_estimated": max(before_update for before_update, _ in estimates),
        "peak": peak_resident_bytes() - before,
        "peak_estimated": max(after_update for _, after_update in estimates),
    }


def _train(engine: Any, workload: Any) -> list[int]:
    """Take `STEPS` steps; return the resident bytes at the end of each backward."""
    resident = []
    for step in range(STEPS):
        tokens = workload.tokens(step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        resident.append(_resident_bytes())
        engine.step()
    return resident


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _estimates(shape: Any, setup: Any, selection: Any, fields: Mapping[str, Any]) -> Iterator[list[int]]:
    """Yield the estimated bytes of each step that was taken, on accelerator and host: without its moments, and with."""
    from ds_agsel.estimate.memory import Stepping, selective_memory
    from ds_agsel.estimate.steps import exact_step

    stepping: Stepping = "host" if setup.offload_optimizer == "cpu" else "resident"
    stepping = fields.get("step_device", stepping)
    active = range(len(shape.blocks))
    before: set[int] = set()
    for record in selection.history:
        after = before | set(record.blocks)
        found = []
        for updated in (before, after):
            step = exact_step(record.phase, len(active), record.blocks, active, updated, streaming=setup.stage > 1)
            memory = selective_memory(shape, setup, stepping, step)
            found.append(memory.accelerator.total + memory.host.total)
        yield found
        before = after


def table(found: Mapping[str, Mapping[str, int]]) -> str:
    """Return the figures as Markdown, those that differ by more than `NEAR` marked."""
    lines = [*markdown_head(_HEADINGS)]
    for name, held in found.items():
        cells = [name]
        for kind in ("after_backward", "peak"):
            measured, estimated = held[kind], held[f"{kind}_estimated"]
            ratio = measured / estimated
            beyond = "" if abs(ratio - 1) <= NEAR else f", beyond {100 * NEAR:.0f} %"
            cells += [f"{measured / MIB:,.0f}", f"{estimated / MIB:,.0f}", f"{ratio:.2f}{beyond}"]
        lines.append(markdown_row(cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the configurations, each in a process of its own, and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONFIGURATIONS, nargs="+", default=list(CONFIGURATIONS))
    parser.add_argument("--one", choices=CONFIGURATIONS, help=argparse.SUPPRESS)  # in this process, as JSON
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    found = {}
    for name in options.only:
        command = [sys.executable, "-m", "launch.benchmarking.memory", "--one", name]
        result = subprocess.run(command, env=os.environ | _ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        if result.returncode == 0:
            found[name] = json.loads(result.stdout.splitlines()[-1])
        else:
            print(f"{name}: ended with {result.returncode}; -9: was there memory enough?", file=sys.stderr, flush=True)
    print(table(found))
    return int(len(found) < len(options.only))


if __name__ == "__main__":
    sys.exit(main())
