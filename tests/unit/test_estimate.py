"""The estimator's arithmetic by hand-computed cases, its rows and its JSON."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.memory import Features, full_memory, selective_memory
from ds_agsel.estimate.models import known_models
from ds_agsel.estimate.setup import Setup, read_setup
from ds_agsel.estimate.shapes import ModelShape, read_shape
from ds_agsel.estimate.steps import exact_step, typical_step
from ds_agsel.estimate.table import as_json, as_text, estimate
from ds_agsel.estimate.traffic import TrafficBytes, full_traffic, selective_traffic
from ds_agsel.lottery import Lottery
from ds_agsel.policies import Quota

CONFIGS = Path(__file__).parents[2] / "configs"
STAGE3 = Setup(stage=3, ranks=2, persistence_threshold_numel=0, max_live_numel=0, reduce_bucket_numel=0)


def model_of(*numels: tuple[int, ...]) -> ModelShape:
    """A model whose blocks have parameters of these sizes."""
    blocks = tuple(Block(i, f"b{i}", (), sum(group)) for i, group in enumerate(numels))
    everything = tuple(numel for group in numels for numel in group)
    return ModelShape("small", blocks, numels, tuple(range(len(numels))), (everything,))


# -------------------------------------------------------------------------- memory


def test_full_training_holds_weights_gradients_masters_and_moments():
    held = full_memory([(10, 6)], (4,), Setup(reduce_bucket_numel=8))
    assert held.accelerator.weights == (16 + 4) * 2
    assert held.accelerator.gradients == 16 * 2
    assert held.accelerator.master_weights == 16 * 4
    assert held.accelerator.states == 16 * 8
    assert held.accelerator.staging == 16 * (2 + 4)  # an update's gradient, flat and in fp32; backward needs less
    wide = full_memory([(10, 6)], (4,), Setup(reduce_bucket_numel=40))
    assert wide.accelerator.staging == (40 + 10) * 2  # the bucket, and the gradient on its way
    assert held.host.total == held.nvme.total == 0


def test_a_visit_to_the_accelerator_brings_twelve_bytes_an_element():
    model = model_of((320,), (192,), (128,))
    step = exact_step("exploit", 3, selected=[1], active=[0, 1, 2], updated=[1, 2])
    held = selective_memory(model, Setup(), "accelerator", step)
    assert held.accelerator.gradients == 192 * 2
    assert held.accelerator.master_weights == 192 * 4
    assert held.accelerator.states == 192 * 8
    assert held.host.master_weights == 640 * 4
    assert held.host.states == 320 * 8
    # The update's gradient in fp32, the rest of the room for the selection and the two largest blocks, and the room
    # through which tensors move there.
    arena = 640 * 12 + 256
    assert held.accelerator.staging == 192 * 4 + arena - 192 * 12
    tight = selective_memory(model, Setup(state_budget_bytes=3840), "accelerator", step)
    assert tight.accelerator.master_weights + tight.accelerator.states == 3840  # a budget that is given is filled
    # Tensors of 128 bytes' multiples; what else they could need has no room with 9 of them.
    assert tight.accelerator.staging == 192 * 4 + 128 * -(-(3840 + 9 * 127) // 128) + 256 - 3840
    kept = selective_memory(model, Setup(keep_master="accelerator"), "accelerator", step)
    assert (kept.accelerator.master_weights, kept.host.master_weights) == (640 * 4, 0)
    assert kept.accelerator.staging == 192 * 4 + (640 - 192) * 8 + 256
    roomy = selective_memory(model, Setup(state_budget_bytes=10**6), "accelerator", step)
    assert roomy.accelerator.states + roomy.accelerator.master_weights == 640 * 12  # more than all states is not taken
    before, after = (selective_memory(model, Setup(), "accelerator", step, moment=moment).accelerator.staging
                     for moment in ("backward", "rest"))  # fmt: skip
    assert (before - after, after) == (192 * 2, arena - 192 * 12)  # backward's one gradient on its way


def test_updates_on_the_accelerator_are_of_64_mib_of_fp32_gradients_or_of_one_group():
    model, numel = model_of((5 * 2**20,), *((4 * 2**20,) for _ in range(5))), 2**24
    blocks = range(6)
    for selected, in_fp32 in (([1, 2], 2 * 2**22), (blocks, numel)):
        step = exact_step("exploit", 6, selected, blocks, blocks)
        for stepping in ("resident", "accelerator"):
            update, rest = (selective_memory(model, Setup(), stepping, step, moment=moment).accelerator.staging
                            for moment in ("update", "rest"))  # fmt: skip
            assert update - rest == 4 * in_fp32
    step = exact_step("exploit", 6, [1, 2], blocks, blocks)
    lean, small = Setup(state_dtype="bf16"), Setup(state_budget_bytes=2**26)  # a group at a time
    of_lean, of_small = (
        selective_memory(model, setup, "accelerator", step, moment="update").accelerator.staging
        - selective_memory(model, setup, "accelerator", step, moment="rest").accelerator.staging
        for setup in (lean, small)
    )
    assert (of_lean, of_small) == (2**22 * (2 + 4 + 4), 2**22 * (2 + 4))
    large = model_of((2**25,), (2**20,))
    both = exact_step("exploit", 2, [0, 1], [0, 1], [0, 1])
    update, rest = (selective_memory(large, Setup(), "resident", both, moment=moment).accelerator.staging
                    for moment in ("update", "rest"))  # fmt: skip
    assert update - rest == 4 * 2**25


def test_moments_in_bf16_are_packed_before_the_old_ones_are_given_up():
    model, step = model_of((10,), (6,)), exact_step("exploit", 2, selected=[1], active=[0, 1], updated=[1])
    lean, plain = (
        selective_memory(model, Setup(offload_optimizer="cpu", state_dtype=dtype), "host", step).host.staging
        for dtype in ("bf16", "fp32")
    )
    assert lean - plain == 10 * 8 + 6 * 4  # the scratch buffer of the largest group, and the selected one's moments


def test_what_is_larger_than_the_budget_passes_through_it():
    step = exact_step("exploit", 2, selected=[0, 1], active=[0, 1], updated=[0, 1])
    model, setup = model_of((320,), (192,)), Setup(state_budget_bytes=3840)
    held = selective_memory(model, setup, "accelerator", step)
    assert held.accelerator.master_weights + held.accelerator.states == 3840
    rest = selective_memory(model, setup, "accelerator", step, moment="rest")
    assert held.accelerator.staging - rest.accelerator.staging == 320 * (2 + 4)


def test_savings_are_flags():
    model = model_of((10,), (6,), (4,), (4,), (2,))
    numels, lottery = (10, 6, 4, 4, 2), Lottery((0, 1, 2, 3, 4), num_selected=1)
    whole, streamed = (typical_step(numels, lottery, "explore", "worst", streaming) for streaming in (False, True))
    held = [selective_memory(model, Setup(), "accelerator", step) for step in (whole, streamed)]
    # The best one, two whose scores are on their way, and the one that backward is at.
    assert [memory.accelerator.gradients for memory in held] == [26 * 2, (10 + 6 + 4 + 4) * 2]
    offloaded = Setup(offload_optimizer="cpu")
    staging = [
        selective_memory(model, offloaded, "host", whole, features=Features(lean_host_staging=lean)).host.staging
        for lean in (False, True)
    ]
    assert staging == [(26 + 10) * 2, (10 + 10) * 2]


def test_stage_3_by_hand():
    groups = [(5, 3)]  # on 2 ranks 3 + 2 elements each
    held = full_memory(groups, (2,), STAGE3)
    assert held.accelerator.weights == (3 + 2 + 1) * 2
    assert held.accelerator.gradients == 5 * 2
    assert held.accelerator.master_weights == 5 * 4
    assert held.accelerator.states == 5 * 8
    assert held.accelerator.staging == 5 * (2 + 4)  # the update's gradient
    in_parts = full_memory(groups, (2,), STAGE3.but(sub_group_numel=2))
    assert in_parts.accelerator.staging == 5 * 2 + 5 * 2  # backward's: one gradient, and one gathered parameter
    offloaded = full_memory(groups, (2,), STAGE3.but(offload_optimizer="cpu", offload_param="cpu"))
    assert offloaded.accelerator.weights == offloaded.accelerator.gradients == 0
    assert offloaded.host.weights == 6 * 2
    assert offloaded.host.gradients == 5 * 2 + 5 * 4
    swapped = full_memory(groups, (), STAGE3.but(offload_optimizer="nvme", sub_group_numel=2, nvme_buffer_count=4))
    assert swapped.nvme.master_weights + swapped.nvme.states == 5 * 12
    assert swapped.host.staging == 4 * 3 * 4
    kept = full_memory(groups, (), STAGE3.but(persistence_threshold_numel=3))
    assert kept.accelerator.weights == (3 + 2) * 2 + 3 * 2


def test_stage_3_selective_by_hand():
    model = model_of((5,), (3,))
    step = exact_step("exploit", 2, selected=[1], active=[0, 1], updated=[1])
    held = selective_memory(model, STAGE3, "resident", step)
    assert held.accelerator.gradients == 2 * 2
    assert held.accelerator.states == 2 * 8
    offloaded = selective_memory(model, STAGE3.but(offload_optimizer="cpu"), "host", step)
    assert offloaded.host.gradients == 2 * (2 + 4)
    swapped = selective_memory(model, STAGE3.but(offload_optimizer="nvme"), "host", step)
    assert swapped.host.gradients == 2 * (2 + 4)
    assert swapped.host.staging == 3 * 12  # the larger block's states
    assert swapped.nvme.total == (3 + 2) * 4 + 2 * 8


# ------------------------------------------------------------------- expected, worst


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_expected_is_the_mean_over_all_selections(numels, data):
    k = data.draw(st.integers(1, len(numels)))
    setup = Setup(ranks=2, offload_optimizer="cpu", accumulation_steps=2, reduce_bucket_numel=0)
    model, everything = model_of(*((numel,) for numel in numels)), tuple(range(len(numels)))
    step = typical_step(numels, Lottery(everything, num_selected=k), "exploit", "expected", streaming=False)
    held = selective_memory(model, setup, "host", step).host.gradients
    draws = [
        selective_memory(model, setup, "host", exact_step("exploit", len(numels), chosen, everything, everything))
        for chosen in combinations(everything, k)
    ]
    mean = Fraction(sum(draw.host.gradients for draw in draws), len(draws))
    assert abs(held - mean) <= Fraction(1, 2)
    lowest = [min(chosen) for chosen in combinations(everything, k)]
    for block, reach in enumerate(step.in_backward):
        assert reach == Fraction(sum(low <= block for low in lowest), len(lowest))


def test_worst_takes_the_largest_blocks_and_those_always_selected():
    lot = (5, 9, 7, 1), Lottery((0, 1, 2), (3,), num_selected=2)
    assert typical_step(*lot, "exploit", "worst", False).selected == (0, 1, 1, 1)
    assert typical_step(*lot, "exploit", "expected", False).selected == (Fraction(2, 3),) * 3 + (1,)
    assert typical_step(*lot, "exploit", "expected", False).arriving == (Fraction(2, 9),) * 3 + (0,)


def test_states_of_a_selection_that_stands_travel_once_a_round():
    lot = (5, 9, 7, 1), Lottery((0, 1, 2), (3,), num_selected=2)
    held = typical_step(*lot, "exploit", "expected", False, select_every=10)
    assert held.arriving == held.leaving == (Fraction(2, 90),) * 3 + (0,)
    assert held.selected == typical_step(*lot, "exploit", "expected", False).selected
    for phase, which in (("exploit", "worst"), ("explore", "expected"), ("explore", "worst")):  # a round's first step
        assert typical_step(*lot, phase, which, False, select_every=10) == typical_step(*lot, phase, which, False)


def test_the_table_is_of_the_section_s_rounds():
    model, setup = model_of((100,), (100,), (100,), (100,)), Setup(ranks=1, offload_optimizer="none")
    by_length = [
        next(row.traffic.h2d for row in estimate(model, setup, SelectionConfig(select_every=length), (50,)).rows
             if (row.phase, row.which, row.stepping) == ("exploit", "expected", "accelerator"))
        for length in (1, 4)
    ]  # fmt: skip
    assert by_length[0] == 4 * by_length[1] > 0


# ------------------------------------------------------------------------- traffic


def test_traffic_of_stage_2_by_hand():
    model, setup = model_of((5,), (3,)), Setup(ranks=2, offload_optimizer="cpu")
    step = exact_step("exploit", 2, selected=[0], active=[0, 1], updated=[0])
    # Five elements are padded to eight; rank 0 has four of them, all of the parameter's.
    assert selective_traffic(model, setup, "host", step) == TrafficBytes(gathered=16, reduced=10, h2d=8, d2h=16)
    assert selective_traffic(model, setup.but(offload_optimizer="none"), "resident", step).h2d == 0
    visiting = selective_traffic(model, setup.but(offload_optimizer="none"), "accelerator", step)
    assert (visiting.h2d, visiting.d2h) == (4 * 12, 0)
    leaving = exact_step("exploit", 2, selected=[0], active=[0, 1], updated=[0], resident=[1])
    assert selective_traffic(model, setup.but(keep_master="accelerator"), "accelerator", leaving).d2h == 2 * 8
    staying = exact_step("exploit", 2, selected=[0], active=[0, 1], updated=[0], resident=[0])
    assert selective_traffic(model, setup.but(offload_optimizer="none"), "accelerator", staying).h2d == 0


def test_traffic_of_stage_3_by_hand():
    model = model_of((5,), (3,), (1,))
    step = exact_step("exploit", 3, selected=[1], active=[0, 1, 2], updated=[1])
    moved = selective_traffic(model, STAGE3, "resident", step)
    assert moved.gathered == (9 + 4) * 2  # forward; backward ends at block 1
    assert moved.reduced == 4 * 2
    kept = selective_traffic(model, STAGE3.but(persistence_threshold_numel=4), "resident", step)
    assert kept.gathered == (5 + 0) * 2 + 4 * 2  # small parameters are gathered when they have been updated
    offloaded = selective_traffic(model, STAGE3.but(offload_optimizer="cpu", accumulation_steps=2), "host", step)
    assert (offloaded.d2h, offloaded.h2d) == (2 * (2 * 2 + 4), 2 * 2 * 2 + 2 * 2)
    swapped = selective_traffic(model, STAGE3.but(offload_optimizer="nvme"), "host", step)
    assert swapped.nvme_read == swapped.nvme_write == 2 * 12
    plain = full_traffic([(9,)], (), STAGE3.but(ranks=1, offload_optimizer="nvme"))
    assert plain.nvme_read == plain.nvme_write == 9 * (12 + 4)
    full = full_traffic([(9,)], (), STAGE3.but(ranks=1, offload_optimizer="cpu", offload_param="cpu"))
    assert (full.gathered, full.reduced) == (0, 0)
    assert (full.h2d, full.d2h) == (2 * 9 * 2 + 9 * 2, 9 * (2 + 4))


# ------------------------------------------------------------------ models and setups


def test_lora_has_an_adapter_on_each_of_seven_linear_layers():
    shape = read_shape("llama-3.2-1b")
    assert len(shape.linears) == 16 * 7
    # q, o: 2048 × 2048; k, v: 2048 × 512; gate, up, down: 2048 × 8192.
    assert sum(shape.lora(8)) == 16 * 8 * (2 * 4096 + 2 * 2560 + 3 * 10240)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(known_models()["smollm2"] | {"num_hidden_layers": 2}))
    return file


def test_a_config_file_and_its_folder_are_models(config_file):
    assert read_shape(str(config_file)).groups == read_shape(str(config_file.parent)).groups
    assert [block.name for block in read_shape(str(config_file)).blocks][1] == "model.layers.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no file .*config\.json"),
        ("{", "is not JSON"),
        ("[]", 'has no "model_type"'),
        ('{"model_type": "nonsense"}', "transformers can't read its config"),
        ('{"model_type": "vit"}', "no causal language model can be built"),
    ],
)
def test_bad_models_are_refused(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_shape(str(file))


def test_a_setup_takes_deepspeeds_defaults_and_says_what_it_assumed():
    setup = read_setup({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"}})
    assert setup.dtype == setup.accumulation_dtype == "bf16"
    assert setup.reduce_bucket_numel == 500_000_000
    assert len(setup.assumed) == 2
    assert read_setup({"zero_optimization": {"stage": 3}}).overlap_comm
    assert read_setup({"zero_optimization": {"stage": 1}, "fp16": {"enabled": False}}).dtype == "fp32"


@pytest.mark.parametrize(
    ("ds_config", "ranks", "message"),
    [
        ({}, 1, r"zero_optimization\.stage=0 can't be estimated"),
        ({"zero_optimization": {"stage": 2}}, 0, "--ranks=0"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, 1, "size='big' is not a number"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": 3}}, 1, "overlap_comm=3 is not true or false"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, 1, "device='gpu' is unknown"),
        ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp8"}}, 1, "'fp8' is unknown"),
    ],
)
def test_bad_setups_are_refused(ds_config, ranks, message):
    with pytest.raises(ConfigError, match=message):
        read_setup(ds_config, ranks)


# ---------------------------------------------------------------------------- table


def rows_of(**settings: Any) -> list[dict[str, Any]]:
    model = model_of((10,), (6,), (4,), (4,))
    setup = Setup(reduce_bucket_numel=0).but(**settings)
    return as_json(estimate(model, setup, SelectionConfig(), [25, 50]))["rows"]


def test_states_on_the_accelerator_are_the_papers_formula():
    for row in rows_of():
        if row["stepping"] == "accelerator":
            assert row["bytes"]["accelerator"]["states"] == row["paper_state_bytes"] == 2 * row["trained_numel"] * 4


def test_rows_are_every_way_of_training():
    named = ("method", "stepping", "select_percent", "phase", "selection")
    kinds = [tuple(row[name] for name in named) for row in rows_of()]
    assert kinds[0] == ("full", "resident", None, None, None)
    assert len(set(kinds)) == len(kinds) == 1 + 2 * 3 * 4
    assert {row["stepping"] for row in rows_of(offload_optimizer="cpu")} == {"host", "accelerator"}
    assert {row["stepping"] for row in rows_of(offload_optimizer="nvme", stage=3)} == {"host"}
    assert [row["num_selected"] for row in rows_of()[1::12]] == [1, 2]


def test_totals_are_the_sums_of_their_parts():
    for row in rows_of(ranks=2):
        for held in row["bytes"].values():
            assert held["total"] == sum(value for kind, value in held.items() if kind != "total")


def test_the_json_form_is_fixed():
    form = as_json(estimate(model_of((10,), (6,)), Setup(), SelectionConfig(), [50]))
    assert form["version"] == 2
    assert list(form) == ["version", "model", "setup", "assumed", "rows"]
    blocks = [{"name": "b0", "numel": 10}, {"name": "b1", "numel": 6}]
    assert form["model"] == {"name": "small", "numel": 16, "blocks": blocks}
    assert list(form["rows"][0]) == [
        "method", "stepping", "select_percent", "num_selected", "lora_rank", "phase", "selection", "trained_numel",
        "paper_state_bytes", "bytes", "traffic_bytes",
    ]  # fmt: skip
    kinds = ["weights", "gradients", "master_weights", "states", "staging", "rounding", "total"]
    assert {place: list(held) for place, held in form["rows"][0]["bytes"].items()} == dict.fromkeys(
        ("accelerator", "host", "nvme"), kinds
    )
    assert json.loads(json.dumps(form)) == form


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_percentages_out_of_range_are_refused(percent):
    with pytest.raises(ConfigError, match=rf"--select-percent {percent} is outside \(0, 100\]"):
        estimate(model_of((1,), (1,)), Setup(), SelectionConfig(), [percent])


def test_the_text_has_a_line_for_each_row():
    result = estimate(model_of((10,), (6,)), Setup(offload_optimizer="cpu"), SelectionConfig(), [50])
    text = as_text(result)
    assert text.count("50 %, exploit, worst") == 2 * 3  # two ways of stepping; accelerator, host, traffic
    assert "On the host" in text and "On NVMe" not in text


# ------------------------------------------------------------ shares of the parameters


def test_a_share_of_the_parameters_is_drawn_as_the_policy_draws_it():
    share = Quota((5, 9, 7), 13)
    lottery = Lottery((1, 2, 3), (0,), num_selected=2, share=share)
    numels = (4, 5, 9, 7)
    admitted = [share.admit(ranking) for ranking in permutations(range(3))]
    expected = typical_step(numels, lottery, "exploit", "expected", False)
    for block in (1, 2, 3):
        exact = Fraction(sum(block - 1 in blocks for blocks in admitted), len(admitted))
        assert abs(expected.selected[block] - exact) < Fraction(3, 100)
    assert expected.selected[0] == 1 and expected.in_backward == (1, 1, 1, 1)
    reach = typical_step(numels[1:], Lottery((0, 1, 2), num_selected=2, share=share), "exploit", "expected", False)
    lowest = [blocks[0] for blocks in admitted]
    for block, found in enumerate(reach.in_backward):
        assert abs(found - Fraction(sum(low <= block for low in lowest), len(lowest))) < Fraction(3, 100)
    assert expected.bound == lottery.bound()


def test_the_largest_share_and_the_gradient_that_arrives_beside_it():
    share = Quota((5, 9, 7), 13)
    lottery = Lottery((0, 1, 2), num_selected=2, share=share)
    worst = typical_step((5, 9, 7), lottery, "explore", "worst", streaming=True)
    assert worst.selected == (1, 0, 1), "12 are more than the 9 of the largest"
    assert worst.with_gradient == (1, 1, 1)
    alone = Lottery((0, 1, 2), num_selected=1, share=Quota((5, 9, 7), 2))
    assert typical_step((5, 9, 7), alone, "exploit", "worst", False).selected == (0, 1, 0)
    held = typical_step((5, 9, 7), alone, "explore", "expected", streaming=True).with_gradient
    assert abs(sum(held) - 2) < Fraction(1, 100)
