"""Part `transfers`: the link's measured rates, and the time that steps wait for states against the model of it.

A step waits for what does not hide under forward and backward. Measured, that is a step at the default budget less one
of a budget that holds all states, where nothing moves. Both take turns of several steps, with no wait between them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.estimate.cards import Card
from ds_agsel.estimate.setup import read_setup
from ds_agsel.estimate.shapes import shape_of
from ds_agsel.estimate.timeline import simulate
from ds_agsel.residency import page_locked

from ..pages import transfers as pages
from .models import Unavailable, ds_config, engine_of, has_own_memory, random_model, section, take_step, tokens, wait
from .parts import STEPS_A_TURN, Size

SAMPLE_BYTES = 256 * 2**20


def run(case: str, size: Size) -> dict[str, Any]:
    """Measure the "rates", or the waits of model/percent; or make the "table" of docs/transfers.md with the rates."""
    if case == "rates":
        return rates(size)
    if case == "table":
        return {"table": pages.as_table(pages.lines_of(pages.MODELS, [_card(size)], pages.PERCENTAGES, pages.TOKENS))}
    model, percent = case.split("/")
    return _waits(model, percent, size)


def rates(size: Size) -> dict[str, float]:
    """Return bytes a second of page-locked copies each way and of device memory, and bf16 operations a second."""
    if not has_own_memory():
        raise Unavailable("the accelerator's memory is the host's: nothing is copied")
    accelerator = get_accelerator()
    host = page_locked.empty(SAMPLE_BYTES, torch.uint8, accelerator)
    device = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, device=accelerator.current_device_name())
    twin = torch.empty_like(device)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=accelerator.current_device_name())
    return {
        "h2d_bytes": SAMPLE_BYTES / _seconds(lambda: device.copy_(host, non_blocking=True)),
        "d2h_bytes": SAMPLE_BYTES / _seconds(lambda: host.copy_(device, non_blocking=True)),
        "memory_bytes": 2 * SAMPLE_BYTES / _seconds(lambda: twin.copy_(device)),
        "flops": 2 * 8192**3 / _seconds(lambda: torch.mm(square, square)),
    }


def _card(size: Size) -> Card:
    """Return the card that is here, with its measured rates."""
    measured = rates(size)
    link = min(measured["h2d_bytes"], measured["d2h_bytes"])
    return Card("here", "measured", measured["flops"], measured["memory_bytes"], link)


def _seconds(action: Any, repeats: int = 10) -> float:
    action()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    wait()
    return (time.perf_counter() - started) / repeats


def _waits(name: str, percent: str, size: Size) -> dict[str, Any]:
    engines = []
    for budget in (None, 2**50):
        model = random_model(name, torch.bfloat16)
        chosen = section(int(percent), "exploit", step_device="accelerator", state_budget_bytes=budget)
        engines.append(engine_of(model, {**ds_config(size, 2, "bf16"), "adagrad_select": chosen}))
    shape = shape_of(name, engines[0].module)
    seconds: list[list[float]] = [[], []]
    for turn in range(2 * size.turns):
        batches = [tokens(engines[0].module, size, STEPS_A_TURN * turn + step) for step in range(STEPS_A_TURN)]
        for which, engine in enumerate(engines):
            wait()
            started = time.perf_counter()
            for batch in batches:
                take_step(engine, batch)
            wait()
            seconds[which].append((time.perf_counter() - started) / STEPS_A_TURN)
    # In the first turns the second has states that visit for the first time.
    moving, still = (statistics.median(each[size.turns :]) for each in seconds)
    found: dict[str, Any] = {
        "seconds_a_step": moving,
        "seconds_where_nothing_moves": still,
        "exposed_seconds": moving - still,
    }
    if has_own_memory():
        card = _card(size)
        setup = read_setup(ds_config(size, 2, "bf16"))
        count = engines[0].selection.lottery.num_selected
        modelled = simulate(shape, setup, card, count, size.micro_batch * size.sequence_length, "exploit")
        found["modelled_exposed_seconds"] = modelled.exposed_seconds
        found["modelled_step_seconds"] = modelled.step_seconds
    return found
