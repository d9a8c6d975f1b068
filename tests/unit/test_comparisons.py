"""The tables of paired differences, from cells on disk; what the small scale compares; the paper's own noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ds_agsel.config import SECTION, parse_section
from ds_agsel.errors import ConfigError
from launch.data.batches import Batching
from launch.reproduction import comparisons, plan, results, tables
from launch.reproduction.differences import Rows
from launch.reproduction.results import CellResult, Point
from launch.training import options, run_config

ROOT = Path(__file__).parents[2]
SMALL = plan.read(ROOT / "configs" / "paper" / "small.yaml")
PUBLISHED = yaml.safe_load((ROOT / "configs" / "paper" / "published.yaml").read_text())


def cell(method: str, seed: int, losses: list[float], seconds: float, peak: int, solved: int) -> CellResult:
    """A run with a measurement every step; its rows have 1, 2, 3 and 4 tokens and losses around the mean."""
    points = tuple(
        Point(
            step, loss, 2.0 * step, seconds * step, Rows((loss + 0.5, 2 * loss - 0.5, 3 * loss, 4 * loss), (1, 2, 3, 4))
        )
        for step, loss in enumerate(losses)
    )
    answers = tuple(float(number < solved) for number in range(4))
    return CellResult(
        "m", method, seed, points=points, processor_seconds=seconds * (len(losses) - 1), peak_in_steps_bytes=peak,
        answers=answers, step_seconds=(1.0,) * (len(losses) - 1),
    )  # fmt: skip


def small(**changes: object) -> plan.SweepPlan:
    fields = {
        "name": "made-up", "deepspeed_config": "x", "steps": 2, "seeds": [1, 2], "reference": "ours",
        "time_limit_seconds": 1, "models": {"m": {"model": "m"}}, "families": {"f": {"learning_rates": [0.1]}},
        "methods": {name: {"method": "full", "family": "f"} for name in ("ours", "base")}, "compare_with": ["base"],
    }  # fmt: skip
    return plan.SweepPlan(**{**fields, **changes})


CELLS = [
    cell("ours", 1, [3.0, 2.0, 1.0], seconds=1.0, peak=5, solved=3),
    cell("ours", 2, [3.0, 2.0, 1.2], seconds=1.0, peak=5, solved=3),
    cell("base", 1, [3.0, 2.6, 1.4], seconds=2.0, peak=7, solved=2),
    cell("base", 2, [3.0, 2.6, 1.6], seconds=2.0, peak=7, solved=2),
]


def test_differences_of_made_up_cells_are_the_known_ones():
    (found,) = comparisons.compare(small(), CELLS)
    assert (found.method, found.reference) == ("ours", "base")
    assert found.equal_steps.mean == pytest.approx(-0.4) and found.equal_steps.is_beyond_chance
    assert found.equal_steps.low == pytest.approx(-0.4) == found.equal_steps.high  # the same in every row and seed
    # After 2 processor seconds ours has ended, and the other has taken one of its two steps.
    assert found.equal_time.mean == pytest.approx(1.1 - 2.6)
    assert found.no_more_memory == found.equal_steps
    assert found.solved.mean == 0.25
    (back,) = comparisons.compare(small(compare_with=["ours"]), CELLS)
    assert back.equal_steps.mean == pytest.approx(0.4) and back.no_more_memory is None


def test_cells_without_rows_or_with_an_error_are_no_difference():
    broken = [CellResult("m", "ours", 1, message="it broke"), *CELLS[2:]]
    (found,) = comparisons.compare(small(), broken)
    assert found.equal_steps is found.equal_time is found.no_more_memory is found.solved is None


def test_the_page_has_a_table_for_each_reference():
    page = tables.page(small(compare_with=["base", "ours"]), CELLS, [], PUBLISHED, "a machine")
    assert "### Differences to base" in page and "### Differences to ours" in page
    assert "| ours | 2 | **-0.4000 [-0.4000, -0.4000]** | **-1.5000 [" in page


def test_results_do_not_repeat_the_rows():
    assert "rows" not in json.dumps(CELLS[0].as_dict()["points"]) and "answers" not in CELLS[0].as_dict()


def test_rows_of_a_run_are_read_from_its_metrics():
    record = {"event": "validation", "step": 0, "loss": 1.5, "row_sums": [1.0, 5.0], "row_tokens": [1, 3]}
    assert results.points_of([record])[0].rows == Rows((1.0, 5.0), (1.0, 3.0))
    assert results.points_of([{**record, "row_sums": [1.0, float("nan")]}])[0].rows is None
    old = {key: value for key, value in record.items() if not key.startswith("row")}
    assert results.points_of([old])[0].rows is None


def test_a_reference_must_be_a_method():
    with pytest.raises(ValueError, match="compare_with has 'nobody', which is none of the methods"):
        small(compare_with=["nobody"])


# The small scale


def section_of(method: str) -> dict[str, object]:
    """The section that the launcher makes of the method's arguments."""
    (found,) = [c for c in plan.final_cells(SMALL) if c.method == method and c.seed == 1]
    wanted = options.parse_peer([*plan.arguments(SMALL, found, 1e-3), "--output", "x"])
    given = {"select_percent": wanted.select_percent, "policy": wanted.policy}
    raw = json.loads((ROOT / wanted.deepspeed_config).read_text())
    complete = run_config.complete(
        raw, batches=Batching(4, 1, 1), steps_per_epoch=150, total_steps=150, lr=wanted.lr, seed=wanted.seed,
        section={**wanted.section, **{name: value for name, value in given.items() if value is not None}},
    )  # fmt: skip
    return complete[SECTION]


def test_the_small_scale_compares_all_axes_with_three_seeds_and_pairs():
    axes = {name: parse_section(section_of(name)) for name, m in SMALL.methods.items() if m.method == "adagrad_select"}
    assert {config.preset for config in axes.values()} >= {"badam", "lisa", "misa", "grass"}
    for name in ("badam", "lisa", "misa", "grass"):
        assert axes[name].is_preset("policy") and axes[name].is_preset("select_percent")
    ours = [config for config in axes.values() if config.policy == "adagrad_select"]
    assert {config.select_every for config in ours} == {1, 5, 20}
    assert {config.on_reentry for config in ours} == {"keep", "reset", "decay"}
    assert {config.score for config in ours} == {"sum", "rms"}
    shares = {(config.granularity, config.select_percent) for config in ours}
    assert shares == {("module", 5), ("module", 20), ("block", 10), ("block", 20), ("block", 30)}
    for policy in ("random", "cyclic", "gradient_topk", "cost_aware"):
        of_policy = [config for config in axes.values() if config.policy == policy and not config.preset]
        assert {config.select_percent for config in of_policy} == {20}
    controls = {config.on_reentry for config in axes.values() if config.policy == "random" and not config.preset}
    assert controls == {"keep", "decay"}  # what is the choice's, and what the decay's
    others = {(m.method, m.method_options.get("rank")) for m in SMALL.methods.values() if m.method != "adagrad_select"}
    assert others == {("full", None), ("lora", 64), ("lora", 256)}
    assert all(method.seeds is None for method in SMALL.methods.values()) and len(SMALL.seeds) == 3
    assert all(len(family.learning_rates) == 4 for family in SMALL.families.values())
    assert SMALL.steps >= 150 and SMALL.options["validation-rows"] >= 256 and SMALL.options["test-rows"] >= 200
    assert SMALL.compare_with == ("random_20", "full")


def test_the_small_scale_is_expected_to_take_less_than_three_hours():
    seconds = plan.expected_seconds(SMALL, [*plan.search_cells(SMALL), *plan.final_cells(SMALL)])
    assert seconds is not None and seconds < 3 * 3600


def test_the_section_of_the_command_line_is_a_json_object(capsys):
    for text, message in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        with pytest.raises(SystemExit):
            options.parse(["--deepspeed_config", "x", "--model", "m", "--output", "o", "--section", text])
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--section need the section"):
        run_config.complete(
            {"train_batch_size": 1}, batches=Batching(1, 1, 1), steps_per_epoch=1, total_steps=1, lr=None, seed=1,
            section={"select_every": 2},
        )  # fmt: skip


# The paper's table


def test_the_paper_s_differences_stand_beside_their_noise():
    lines = list(comparisons.published_lines(PUBLISHED))
    (llama,) = [line for line in lines if line.startswith("| gsm8k | llama-3.2-1b |")]
    percents = [text.strip() for text in llama.split("|")[3:-1]]
    assert [text.strip("*").split(" ")[0] for text in percents] == ["-4.2", "-3.2", "+0.6", "+0.5", "-1.7"]
    assert percents[0].startswith("**-4.2 [-8.0, -0.4]**")  # 10 % against full is beyond 1,319 problems' noise
    bold = [line.split("|")[1:3] for line in lines if "**" in line]
    assert all(name.strip() == "llama-3.2-1b" for _, name in bold) and len(bold) == 2
    assert list(comparisons.published_lines({"accuracy": PUBLISHED["accuracy"]})) == []


def test_published_has_the_paper_s_table_1():
    told = PUBLISHED["accuracy"]
    assert {dataset: set(models) for dataset, models in told.items()} == {
        dataset: {"qwen2.5-0.5b", "llama-3.2-1b", "phi-4-mini"} for dataset in ("gsm8k", "math")
    }
    assert sum(len(methods) for models in told.values() for methods in models.values()) == 36
    assert told["gsm8k"]["phi-4-mini"]["adagrad_select_20"] == 85.90 and told["math"]["llama-3.2-1b"]["full"] == 33.07
