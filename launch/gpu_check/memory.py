"""Part `memory`: bytes that a step takes on the accelerator and page-locked, beside what `ds-agsel estimate` says."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.config import SelectionConfig
from ds_agsel.estimate.setup import read_setup
from ds_agsel.estimate.shapes import shape_of
from ds_agsel.estimate.table import as_json, estimate
from ds_agsel.zero.states.visits import Visits

from .models import ds_config, engine_of, has_own_memory, random_model, section, take_step, tokens, wait, with_lora
from .parts import Size


def run(case: str, size: Size) -> dict[str, Any]:
    """Measure model/method, ZeRO-2 in bf16; return bytes and seconds a step."""
    name, method = case.split("/")
    kind, _, number = method.partition("-")
    model = random_model(name, torch.bfloat16)
    config = ds_config(size, 2, "bf16")
    shape = shape_of(name, model)
    if kind == "lora":
        model = with_lora(model, int(number))
    elif kind == "exploit":
        config["adagrad_select"] = section(int(number), "exploit")
    engine = engine_of(model, config)
    accelerator = get_accelerator()
    batches = [tokens(model, size, step) for step in range(size.steps + 2)]
    for batch in batches[:2]:
        take_step(engine, batch)
    wait()
    accelerator.reset_peak_memory_stats()
    started = time.perf_counter()
    for batch in batches[2:]:
        take_step(engine, batch)
    wait()
    seconds = (time.perf_counter() - started) / size.steps
    found = {
        "allocated_bytes": _of(accelerator.memory_allocated),
        "peak_allocated_bytes": _of(accelerator.max_memory_allocated),
        "peak_reserved_bytes": _of(getattr(accelerator, "max_memory_reserved", accelerator.max_memory_allocated)),
        "pinned_bytes": pinned_bytes(),
        "seconds_a_step": seconds,
        "parameters": shape.numel,
        "states_on_accelerator_bytes": _resident(engine),
        "pool_to_budget": _pool_to_budget(engine),
    }
    return {**found, "estimate": _estimated(shape, config, kind, number)}


def pinned_bytes() -> dict[str, int]:
    """Return what torch's caching host allocator has been asked for and has taken; empty where it doesn't say."""
    with contextlib.suppress(AttributeError, RuntimeError, AssertionError):
        stats = torch.cuda.host_memory_stats()
        return {key: int(value) for key, value in stats.items() if "bytes" in key and key.endswith(("current", "peak"))}
    return {}


def _of(number: Any) -> int:
    return int(number()) if has_own_memory() else 0


def _resident(engine: Any) -> int:
    return int(engine.optimizer.resident_state_bytes()) if hasattr(engine.optimizer, "home") else 0


def _pool_to_budget(engine: Any) -> float | None:
    """Return the memory held for states that visit as a multiple of their budget; None where none visit."""
    home = getattr(engine.optimizer, "home", None)
    if not isinstance(home, Visits):
        return None
    return home.transfer.arena_bytes / home.budget_bytes


def _estimated(shape: Any, config: dict[str, Any], kind: str, number: str) -> dict[str, Any] | None:
    """Return the estimator's bytes, activations not included; None where it has no such row."""
    percent = int(number) if kind == "exploit" else 20
    rows = as_json(estimate(shape, read_setup(config), SelectionConfig(), [percent]))["rows"]
    stepping = "accelerator" if kind == "exploit" and has_own_memory() else "resident"
    for row in rows:
        is_step = (row["phase"], row["selection"]) == ("exploit", "worst")
        wanted = {
            "full": row["method"] == "full",
            "exploit": row["method"] == "ds_agsel" and row["stepping"] == stepping and is_step,
            "lora": row["method"] == "lora" and str(row["lora_rank"]) == number,
        }
        if wanted[kind]:
            return {place: row["bytes"][place]["total"] for place in ("accelerator", "host")}
    return None
