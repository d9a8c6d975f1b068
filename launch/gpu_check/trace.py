"""Part `trace`: steps under torch's profiler: launches, host waits, and how far copies overlap with kernels.

Several steps in a row, since states travel from the end of one step on under the next; all numbers are for one step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .models import destroy_all, ds_config, engine_of, random_model, section, take_step, tokens, wait
from .parts import Size

Span = tuple[float, float]
WARMUP_STEPS = 4
STEPS = 3


def run(case: str, size: Size, folder: Path) -> dict[str, Any]:
    """Profile model/phase at 20 %, ZeRO-2 in bf16, and plain DeepSpeed beside it; write both traces."""
    name, phase = case.split("/")
    return {
        "plain": _profiled(name, size, None, folder / f"{phase}-plain.json"),
        phase: _profiled(name, size, section(20, phase), folder / f"{phase}.json"),
    }


def _profiled(name: str, size: Size, chosen: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    model = random_model(name, torch.bfloat16)
    config = ds_config(size, 2, "bf16")
    engine = engine_of(model, config if chosen is None else {**config, "adagrad_select": chosen})
    for step in range(WARMUP_STEPS):
        take_step(engine, tokens(model, size, step))
    wait()
    batches = [tokens(model, size, WARMUP_STEPS + step) for step in range(STEPS)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        for batch in batches:
            take_step(engine, batch)
        wait()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    destroy_all()
    return {"trace": path.name, **read(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], STEPS)}


def read(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return the numbers of a chrome trace of ``steps``, for one: runtime calls, seconds of copies, their overlap."""
    calls: Counter[str] = Counter()
    spans: dict[str, list[Span]] = {"kernel": [], "h2d": [], "d2h": []}
    for event in events:
        kind, name = event.get("cat", ""), str(event.get("name", ""))
        if kind in ("cuda_runtime", "cuda_driver"):
            calls[_call(name)] += 1
        elif kind == "cpu_op":
            calls["operators"] += 1
        elif kind in ("kernel", "gpu_memcpy") and "dur" in event:
            which = "kernel" if kind == "kernel" else "h2d" if "HtoD" in name else "d2h" if "DtoH" in name else ""
            if which:
                spans[which].append((event["ts"], event["ts"] + event["dur"]))
    kernels = merged(spans["kernel"])
    copies = merged(spans["h2d"] + spans["d2h"])
    copied, hidden = total(copies), overlap(copies, kernels)
    return {
        "launches": calls["launch"] / steps, "host_waits": calls["wait"] / steps, "copies": calls["copy"] / steps,
        "operators": calls["operators"] / steps, "page_locked_allocations": calls["pin"] / steps,
        "kernel_seconds": total(kernels) / 1e6 / steps, "copy_seconds": copied / 1e6 / steps,
        "copies_overlapped_fraction": hidden / copied if copied else None,
    }  # fmt: skip


def _call(name: str) -> str:
    if "Launch" in name:
        return "launch"
    if "Synchronize" in name:
        return "wait"
    if "HostAlloc" in name or "HostRegister" in name:
        return "pin"
    return "copy" if "Memcpy" in name else "other"


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the union of ``spans`` as disjoint ones, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def total(spans: Iterable[Span]) -> float:
    """Return the length of disjoint ``spans``."""
    return sum(end - start for start, end in spans)


def overlap(one: Iterable[Span], other: list[Span]) -> float:
    """Return the length of what two lists of disjoint spans have in common."""
    return sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in one for begin, stop in other)
