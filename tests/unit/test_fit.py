"""The search of `ds-agsel fit`: nothing better was overlooked, and its bytes are the estimator's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from test_estimate import model_of

from ds_agsel.config import SECTION, SelectionConfig
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.activations import Activations
from ds_agsel.estimate.cards import Card
from ds_agsel.estimate.fit import (
    CARD_RESERVE_BYTES,
    CARD_RESERVE_SHARE,
    HOST_RESERVE_BYTES,
    PROCESS_BYTES,
    SLOWER,
    Candidate,
    Job,
    Machine,
    ordered,
    search,
)
from ds_agsel.estimate.fit_text import as_text, describe, sentence, shown
from ds_agsel.estimate.prediction import Rates, Seconds
from ds_agsel.estimate.setting import AXES, LOSSY, settings
from ds_agsel.estimate.setup import read_setup
from ds_agsel.estimate.sizes import GIB
from ds_agsel.estimate.table import estimate

MIB = 2**20
# Ten blocks of 24 M and 8 M elements: 12 bytes each are 1.5 GiB.
MODEL = model_of((24_000_000,), *((6_000_000, 2_000_000) for _ in range(8)), (24_000_000,))
ACTIVATIONS = Activations(saved_bytes=200_000, input_bytes=2_000, logits_bytes=30_000, layers=8)
CARD = Card("toy", "", flops=1e13, memory_bytes=5e11, link_bytes=1e10, nvlink_bytes=0, capacity_bytes=4 * GIB)
MACHINE = Machine(Rates(CARD), 1, 16 * GIB)
JOB = Job(sequence_length=512, tokens_per_step=4096)
SMALL: dict[str, Any] = {
    **AXES, "select_percent": (50.0, 10.0), "stage": (2, 3), "offload_param": ("none", "cpu"), "pin_memory": (True,),
    "micro_batch_size": (8, 1), "master_weights": ("fp32",), "on_reentry": ("keep",), "unit": ("block",),
}  # fmt: skip


def with_card(gib: float, host: float = 16.0, **changes: Any) -> Machine:
    card = replace(CARD, capacity_bytes=round(gib * GIB))
    return replace(MACHINE, rates=Rates(card), host_bytes=round(host * GIB), **changes)


def is_better(one: Candidate, other: Candidate, fastest: float) -> bool:
    """The documented order, spelt out."""
    slow = [candidate.step_seconds > SLOWER * fastest for candidate in (one, other)]
    if slow[0] != slow[1]:
        return slow[1]
    if not slow[0]:
        if one.setting.select_percent != other.setting.select_percent:
            return one.setting.select_percent > other.setting.select_percent
        if one.setting.lossy != other.setting.lossy:
            return one.setting.lossy < other.setting.lossy
    return one.step_seconds < other.step_seconds - 0.01 * SLOWER * fastest


# ------------------------------------------------------------------------- search


@pytest.mark.parametrize(("gib", "host"), [(4, 16), (4, 5.5), (8, 32)])
def test_no_better_setting_was_overlooked(gib, host):
    machine = with_card(gib, host)
    found = search(MODEL, ACTIVATIONS, machine, JOB, SMALL)
    everything = (*found.fitting, *found.failing)
    tried = [replace(candidate.setting, micro_batch_size=1) for candidate in everything]
    assert sorted(map(repr, tried)) == sorted({repr(replace(one, micro_batch_size=1)) for one in settings(SMALL)})
    fitting = [
        candidate for candidate in everything
        if candidate.card_bytes <= gib * GIB * (1 - CARD_RESERVE_SHARE) - CARD_RESERVE_BYTES
        and candidate.host_bytes <= host * GIB - HOST_RESERVE_BYTES
    ]  # fmt: skip
    assert set(map(id, fitting)) == set(map(id, found.fitting)) and fitting
    fastest = min(candidate.step_seconds for candidate in fitting)
    for place, candidate in enumerate(found.fitting):
        assert not any(is_better(other, candidate, fastest) for other in found.fitting[place + 1 :])
    over = [sum(candidate.over.values()) for candidate in found.failing]
    assert over == sorted(over) and all(amount > 0 for amount in over)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_are_those_of_estimate(ranks):
    job = Job(512, 4096 * ranks)
    found = search(MODEL, ACTIVATIONS, replace(MACHINE, ranks=ranks), job, SMALL)
    seen = set()
    for candidate in (*found.fitting, *found.failing):
        setting = candidate.setting
        key = (setting.home, setting.stage, setting.offload_param, setting.keep_master, setting.explore_on)
        if setting.select_percent != 50 or key in seen:
            continue
        seen.add(key)
        config = SelectionConfig(**candidate.ds_config[SECTION])
        rows = [
            row for row in estimate(MODEL, read_setup(candidate.ds_config, ranks), config, [50.0]).rows
            if (row.method, row.stepping, row.which) == ("ds_agsel", setting.stepping, "worst")
        ]  # fmt: skip
        activations = ACTIVATIONS.peak_bytes(setting.micro_batch_size * 512, checkpointing=setting.checkpointing)
        assert candidate.card_bytes == max(row.memory.accelerator.total for row in rows) + activations
        arrays = max(row.memory.host.total for row in rows)
        assert candidate.host_bytes == ranks * (max(arrays, 2 * MODEL.numel) + PROCESS_BYTES)
        assert candidate.nvme_bytes == ranks * max(row.memory.nvme.total for row in rows)
    assert len(seen) > 12


def test_more_memory_never_loses_a_setting():
    before: set[Any] = set()
    for gib in (3, 4, 8):
        found = search(MODEL, ACTIVATIONS, with_card(gib), JOB, SMALL)
        fitting = {replace(c.setting, micro_batch_size=1) for c in found.fitting}
        assert before <= fitting
        before = fitting


def test_of_micro_batches_the_largest_that_fits_is_kept():
    axes = {**SMALL, "micro_batch_size": (8, 4, 2, 1), "home": ("visit",), "stage": (2,), "select_percent": (10.0,)}
    machine, sizes = with_card(3), (1, 2, 4, 8)
    each = {size: search(MODEL, ACTIVATIONS, machine, JOB, {**axes, "micro_batch_size": (size,)}) for size in sizes}
    fits = {size: {replace(c.setting, micro_batch_size=1) for c in each[size].fitting} for size in sizes}
    assert fits[8] != fits[1]
    for candidate in search(MODEL, ACTIVATIONS, machine, JOB, axes).fitting:
        alike = replace(candidate.setting, micro_batch_size=1)
        assert candidate.setting.micro_batch_size == max(size for size in sizes if alike in fits[size])


def test_an_axis_with_a_single_value_is_kept():
    axes = {**SMALL, "home": ("visit",), "select_percent": (10.0,)}
    found = search(MODEL, ACTIVATIONS, with_card(8, 32), JOB, axes)
    assert {candidate.setting.home for candidate in (*found.fitting, *found.failing)} == {"visit"}
    assert {c.setting.select_every for c in found.fitting} == {1, 20}


def test_every_axis_is_a_field_and_every_combination_is_possible_once():
    first = next(settings())
    assert list(AXES) == list(vars(first))
    assert LOSSY.items() <= {name: values[0] for name, values in AXES.items()}.items()
    assert len(set(settings(SMALL))) == len(list(settings(SMALL)))


def test_leaner_states_and_other_units_are_tried_and_ranked_after_what_learns_the_same():
    single = model_of(*((2_000_000,) for _ in range(56)))  # the same elements, in 56 units
    axes = {
        **SMALL, "home": ("host",), "stage": (2,), "offload_param": ("none",), "explore_on": ("batch",),
        "checkpointing": (False,), "micro_batch_size": (1,), "select_percent": (50.0,),
        **{name: AXES[name] for name in ("master_weights", "on_reentry", "unit")},
    }  # fmt: skip
    found = search(MODEL, ACTIVATIONS, with_card(8, 64), JOB, axes, {"module": single, "entries": single})
    by_fields = {
        (c.setting.unit, c.setting.master_weights, c.setting.state_dtype, c.setting.on_reentry): c
        for c in found.fitting
    }  # fmt: skip
    assert len(by_fields) == len(found.fitting) == 6 + 2 + 6 + 3
    host = {key: candidate.host_bytes for key, candidate in by_fields.items()}
    plain = ("block", "fp32", "fp32", "keep")
    assert host["block", "split", "int8", "keep"] < host["block", "split", "bf16", "keep"]
    assert host["block", "split", "bf16", "keep"] < host["block", "split", "fp32", "keep"] < host[plain]
    assert host["block", "fp32", "fp32", "reset"] < host[plain] and host["module", "fp32", "fp32", "keep"] < host[plain]
    order = list(by_fields)
    assert {order[0], order[1]} == {plain, ("block", "split", "fp32", "keep")}  # nothing by which it learns otherwise
    assert {unit for unit, *_ in order[-2:]} == {"entries"}  # few elements of a matrix: never before whole ones
    assert "master_weights split, state_dtype bf16" in describe(by_fields["block", "split", "bf16", "keep"].setting)


def test_what_page_locked_buffers_take_is_counted():
    [pinned, pageable] = [
        next(c for c in search(MODEL, ACTIVATIONS, with_card(8, 64), JOB, {**SMALL, "pin_memory": (pin,)}).fitting
             if (c.setting.home, c.setting.stage) == ("host", 2))
        for pin in (True, False)
    ]  # fmt: skip
    assert pinned.explained["rounding"] > pageable.explained["rounding"] == 0
    assert pinned.host_bytes - pinned.explained["rounding"] == pageable.host_bytes


def test_a_drive_that_is_too_small_is_said():
    axes = {**SMALL, "home": ("nvme",), "offload_param": ("none",)}
    found = search(MODEL, ACTIVATIONS, with_card(8, 32, nvme_bytes=GIB), JOB, axes)
    assert found.fitting and {candidate.setting.state_dtype for candidate in found.fitting} == {"bf16", "int8"}
    found = search(MODEL, ACTIVATIONS, with_card(8, 32, nvme_bytes=GIB // 2), JOB, axes)
    assert not found.fitting and set(found.failing[0].over) == {"nvme"}
    assert "GiB more on NVMe" in sentence(found, {"model": "m"})


# -------------------------------------------------------------------------- order


def candidate_of(percent: float, seconds: float, **fields: Any) -> Candidate:
    setting = replace(next(settings()), select_percent=percent, **fields)
    return Candidate(setting, {}, 0, 0, 0, {}, Seconds(compute=seconds), None, {})


def test_percent_comes_first_while_it_costs_less_than_half_more():
    few, many, slow = candidate_of(10, 1.0), candidate_of(50, 1.4), candidate_of(100, 1.6)
    assert ordered([slow, few, many]) == (many, few, slow)


def test_a_field_by_which_a_run_learns_otherwise_comes_after_one_that_is_slower():
    exact, lossy = candidate_of(50, 1.4), candidate_of(50, 1.0, explore_on="first_micro_batch")
    assert ordered([lossy, exact]) == (exact, lossy)


def test_the_order_does_not_depend_on_that_of_the_input():
    every = [candidate_of(p, s, select_every=e) for p, s, e in itertools.product((10, 50), (1.0, 1.4, 2.0), (1, 20))]
    assert ordered(every) == ordered(
        sorted(every, key=lambda c: (c.setting.select_percent, c.step_seconds, c.setting.lossy))
    )


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("job", "ranks", "message"),
    [
        (Job(512, 1000), 1, r"--tokens-per-step=1000 is not a multiple of .* \(512 x 1\)\. Use 512 or 1024\."),
        (Job(512, 512), 2, r"\(512 x 2\)\. Use 1024\."),
        (Job(512, 4096, 3), 1, "--micro-batch-size=3 doesn't divide the 8 rows of a step and rank"),
    ],
)
def test_tokens_that_do_not_come_out_even_are_refused(job, ranks, message):
    with pytest.raises(ConfigError, match=message):
        search(MODEL, ACTIVATIONS, replace(MACHINE, ranks=ranks), job, SMALL)


# --------------------------------------------------------------------------- text


def test_the_answer_ends_with_one_sentence_on_what_to_run_next():
    found = search(MODEL, ACTIVATIONS, MACHINE, JOB, SMALL)
    text = as_text(found, 4, {"model": "org/name", "output": "ds.json"})
    last = text.splitlines()[-1]
    assert last.startswith("small fits toy with 16 GiB of host memory: ")
    assert "ds-agsel train --deepspeed_config ds.json --model org/name --sequence-length 512" in last
    assert "predictions" in text and text.count("\n  ") == len({c.setting.home for c in found.failing})
    lines = shown(found.fitting, 4)
    assert len({(c.setting.select_percent, c.setting.home) for c in lines}) == len(lines) <= 4
    assert lines[0] is found.best


def test_a_miss_says_by_how_much_and_what_to_try():
    found = search(MODEL, ACTIVATIONS, with_card(1.2, 4), replace(JOB, sequence_length=1024), SMALL)
    last = as_text(found, 4, {"model": "m"}).splitlines()[-1]
    assert last.startswith("small does not fit toy with 4 GiB of host memory: the nearest setting (")
    nearest = min(sum(c.over.values()) for c in found.failing)
    assert sum(found.failing[0].over.values()) == nearest
    assert f"{found.failing[0].over['card'] / GIB:.1f} GiB more on the card" in last
    assert "--sequence-length 512" in last
