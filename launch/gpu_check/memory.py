"""Part `memory`: bytes that a step takes on the accelerator and page-locked, beside what `ds-agsel estimate` says."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.config import SelectionConfig
from ds_agsel.estimate.memory import Memory, Moment, Stepping, full_memory, selective_memory
from ds_agsel.estimate.setup import Setup, read_setup
from ds_agsel.estimate.shapes import ModelShape, shape_of
from ds_agsel.estimate.steps import typical_step
from ds_agsel.lottery import build_lottery
from ds_agsel.zero.states.visits import Visits

from .models import ds_config, engine_of, has_own_memory, random_model, section, take_step, tokens, wait, with_lora
from .parts import Size

_MOMENTS: tuple[Moment | None, ...] = (None, "rest")


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


def _estimated(shape: ModelShape, config: dict[str, Any], kind: str, number: str) -> dict[str, int]:
    """Return the estimator's bytes, activations not included: the most of a step, and what is there between steps."""
    setup = read_setup(config)
    stepping: Stepping = "accelerator" if has_own_memory() else "resident"
    most, at_rest = (estimated(shape, setup, stepping, kind, number, moment) for moment in _MOMENTS)
    return {"accelerator": most.accelerator.total, "between_steps": bytes_between_steps(at_rest)}


def estimated(
    shape: ModelShape, setup: Setup, stepping: Stepping, kind: str, number: str, moment: Moment | None = None
) -> Memory:
    """Return the estimate of "full", of "exploit" at ``number`` percent, or of "lora" of rank ``number``."""
    if kind == "full":
        return full_memory(shape.user_groups, shape.frozen, setup, moment=moment)
    if kind == "lora":
        base = (*sum(shape.groups, ()), *shape.frozen)
        return full_memory([shape.lora(int(number))], base, setup, moment=moment)
    lottery = build_lottery(shape.blocks, SelectionConfig(select_percent=int(number)))
    numels = [block.numel for block in shape.blocks]
    step = typical_step(numels, lottery, "exploit", "worst", streaming=True)
    return selective_memory(shape, setup, stepping, step, moment=moment)


def bytes_between_steps(at_rest: Memory) -> int:
    """Return what of an estimate at rest is on the accelerator between steps, where gradients are gone."""
    return at_rest.accelerator.total - at_rest.accelerator.gradients
