"""Peak resident memory of real engines on a CPU, beside the estimate: python -m launch.benchmarking.memory.

Each configuration trains a model with random weights, of SmolLM2-135M's shape or of about 0.5 B parameters, in a
process of its own. What it held before the model was made, once a tiny one has been trained so that all libraries are
there, is subtracted. On a CPU the accelerator's memory and the host's are one, and nothing is page-locked, so the
estimate is the sum of both without rounding, at the largest of the steps that were taken. Rows are short, so that
activations, which the estimate leaves out, are small.

[Note: Norms on a CPU] Torch takes a norm in fp64 of a tensor on a CPU from a copy in fp64 (ReduceOpsUtils.h,
make_reduction), on CUDA inside the kernel (ForeachReduceOp.cu). The estimate is of a card; here the copy of the largest
gradient whose norm is taken is added: 8 bytes for each of its elements. With offload, and on explore steps, that is in
backward, else before the update. With ZeRO-2 and offload an explore step's gradients go to the host after that.

[Note: One form at a time] With ZeRO-1 and offload all gradients are whole on the card when backward has ended, and then
go to the host in fp32, one after the other. Each of the two memories has room for all; in a memory that is both, a
gradient is there in one form, and beside all in fp32 there is one in the model's dtype. The others are left out here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
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
SHAPES: Mapping[str, tuple[int, ...]] = {"135m": (576, 1536, 30, 9, 3, 49152), "0.5b": (896, 4864, 24, 14, 2, 151936)}
_HEADINGS = ("model", "configuration", "peak, MiB", "estimated", "ratio")


def measure(model: str, name: str) -> dict[str, int]:
    """Train ``model`` in the configuration ``name`` in this process; return the measured and the estimated bytes."""
    import ds_agsel
    from ds_agsel.config import parse_section
    from ds_agsel.estimate.setup import read_setup
    from ds_agsel.estimate.shapes import shape_of
    from ds_agsel.estimate.table import with_section

    from ..training.costs import peak_resident_bytes, reset_peak_resident
    from .processes import Shape, Workload, connect_alone

    stage, offload, fields = CONFIGURATIONS[name]
    workload = Workload(Shape(*SHAPES[model]), 1, TOKENS, "bf16", offload, seed=0, stage=stage)
    tiny = replace(workload, shape=Shape(64, 128, 4, 4, 2, 512))
    config = {**workload.ds_config(), "adagrad_select": {**SECTION, **fields}}
    setup = with_section(read_setup(config), parse_section(config["adagrad_select"])).but(rounds_page_locked=False)
    connect_alone()

    def engine_of(work: Workload) -> Any:
        model = work.model()
        return ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    warm = engine_of(tiny)
    _train(warm, tiny)
    warm.destroy()
    before = _resident_bytes()
    engine = engine_of(workload)
    shape = shape_of(model, _on_meta(engine.module.config))
    reset_peak_resident()
    _train(engine, workload)
    peak = peak_resident_bytes() - before
    return {"peak": peak, "estimated": max(_estimates(shape, setup, engine.selection, fields))}


def _on_meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def _train(engine: Any, workload: Any) -> None:
    """Take `STEPS` steps."""
    for step in range(STEPS):
        tokens = workload.tokens(step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _estimates(shape: Any, setup: Any, selection: Any, fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the estimated bytes of each step that was taken, of accelerator and host together."""
    from ds_agsel.estimate.memory import Moment, Stepping, selective_memory
    from ds_agsel.estimate.steps import exact_step

    stepping: Stepping = "host" if setup.offload_optimizer == "cpu" else "resident"
    stepping = fields.get("step_device", stepping)
    active = range(len(shape.blocks))
    updated: set[int] = set()
    moments: tuple[Moment, ...] = ("backward", "update")
    for record in selection.history:
        copied = active if record.phase == "explore" else record.blocks  # [Note: Norms on a CPU]
        norms = 8 * max(max(group) for group, block in zip(shape.groups, shape.block_of_group) if block in copied)
        in_backward = record.phase == "explore" or stepping == "host"
        for moment, have in zip(moments, (updated, updated | set(record.blocks))):
            step = exact_step(record.phase, len(active), record.blocks, active, have, streaming=setup.stage > 1)
            memory = selective_memory(shape, setup, stepping, step, moment=moment)
            if moment == "backward":
                later = memory.host.gradients if step.streams and setup.stage < 3 else 0
                more = max(0, norms - later) if in_backward else 0
                if setup.stage == 1 and stepping == "host":  # [Note: One form at a time]
                    numels = [sum(group) for group, block in zip(shape.groups, shape.block_of_group) if block in copied]
                    more -= (sum(numels) - max(numels)) * setup.item_bytes
            else:  # before an update nothing of its own has been made
                more = 0 if in_backward else max(0, norms - memory.accelerator.staging)
            yield memory.accelerator.total + memory.host.total + more
        updated |= set(record.blocks)


def table(found: Mapping[tuple[str, str], Mapping[str, int]]) -> str:
    """Return the figures as Markdown, those that differ by more than `NEAR` marked."""
    lines = [*markdown_head(_HEADINGS)]
    for (model, name), held in found.items():
        ratio = held["peak"] / held["estimated"]
        beyond = "" if abs(ratio - 1) <= NEAR else f", beyond {100 * NEAR:.0f} %"
        sizes = [f"{held[kind] / MIB:,.0f}" for kind in ("peak", "estimated")]
        lines.append(markdown_row([model, name, *sizes, f"{ratio:.2f}{beyond}"]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the configurations, each in a process of its own, and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=list(SHAPES), help="0.5b takes up to 14 GB")
    parser.add_argument("--only", choices=CONFIGURATIONS, nargs="+", default=list(CONFIGURATIONS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # model and configuration, in this process, as JSON
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(*options.one)))
        return 0
    wanted = list(product(options.models, options.only))
    found = {}
    for model, name in wanted:
        command = [sys.executable, "-m", "launch.benchmarking.memory", "--one", model, name]
        result = subprocess.run(command, env=os.environ | _ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        if result.returncode == 0:
            found[model, name] = json.loads(result.stdout.splitlines()[-1])
            print(table({(model, name): found[model, name]}).splitlines()[-1], file=sys.stderr, flush=True)
        else:
            print(f"{model}, {name}: ended with {result.returncode}; -9: was there memory enough?", file=sys.stderr)
    print(table(found))
    return int(len(found) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
