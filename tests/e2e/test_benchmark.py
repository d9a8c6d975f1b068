"""The benchmark on a model of a few thousand parameters: every row, every bar, and numbers that don't hang on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.benchmarking.command import parse

ROOT = Path(__file__).parents[2]
TINY = {
    "--hidden-size": "32",
    "--intermediate-size": "64",
    "--layers": "3",
    "--heads": "4",
    "--kv-heads": "2",
    "--vocab-size": "128",
    "--micro-batch": "2",
    "--sequence-length": "16",
    "--precision": "bf16",
    "--threads": "1",
}
STEPS = 2
BLOCKS = 5  # embedding, three layers, final norm
EXPLOIT_ROWS = {"exploit-10", "exploit-20", "exploit-30"}
EXPLORE_ROWS = {"explore-10", "explore-20", "explore-30"}
ROWS = {"plain", "all", "floor-20"} | EXPLOIT_ROWS | EXPLORE_ROWS

pytestmark = pytest.mark.timeout(400)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    tiny = [word for option in TINY.items() for word in option]
    return subprocess.run(
        [sys.executable, "launch/benchmark.py", *tiny, "--steps", str(STEPS), *arguments],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=380,
    )  # fmt: skip


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON of a run with offload, and what it printed."""
    output = tmp_path_factory.mktemp("benchmark")
    done = run_benchmark("--offload", "cpu", "--output", str(output))
    assert done.returncode == 0, done.stderr
    return json.loads((output / "benchmark.json").read_text()), done.stdout


def test_every_row_is_measured(benchmark: tuple[dict[str, Any], str]) -> None:
    results, printed = benchmark
    rows = results["offload"]["cpu"]["rows"]
    assert set(rows) == ROWS
    assert all(f"\n{row} " in printed for row in ROWS)
    for name, row in rows.items():
        assert row["steps"] == (2 * STEPS if name == "plain" else STEPS)
        assert all(spread["median"] > 0 for spread in row["seconds"].values())
        assert row["peak_bytes"]["resident"] > 0
        assert row["tokens_per_second"] > 0
    assert rows["plain"]["step_to_plain"]["median"] == 1
    assert {"processor", "versions", "threads"} <= set(results["machine"])


def test_every_bar_is_judged(benchmark: tuple[dict[str, Any], str]) -> None:
    results, printed = benchmark
    bars = results["offload"]["cpu"]["bars"]
    assert len(bars) == 2 + 3 + 1 + 3 + 3 + 3
    assert all(bar["met"] == (bar["value"] <= bar["limit"]) for bar in bars)
    assert all(bar["name"] in printed for bar in bars)
    held = [bar for bar in bars if "gradient bytes / bytes of the selected" in bar["name"]]
    assert [bar["value"] for bar in held] == [1.0] * 3
    streamed = [bar["value"] for bar in bars if "most gradient bytes" in bar["name"]]
    assert len(streamed) == 3 and all(0.1 < value <= 1 for value in streamed)


def test_the_rows_do_what_they_are_called(benchmark: tuple[dict[str, Any], str]) -> None:
    results, _ = benchmark
    samples = results["offload"]["cpu"]["samples"]
    for row in EXPLOIT_ROWS:
        assert all(sample["phase"] == "exploit" and len(sample["blocks"]) == 1 for sample in samples[row])
    for row in EXPLORE_ROWS:
        assert all(sample["phase"] == "explore" and len(sample["blocks"]) == 1 for sample in samples[row])
    for row in ("plain", "all"):
        assert all(len(sample["blocks"]) == BLOCKS for sample in samples[row])
    followed = {sample["round"]: sample["blocks"] for sample in samples["exploit-20"]}
    assert {sample["round"]: sample["blocks"] for sample in samples["floor-20"]} == followed


def test_all_rows_see_the_same_batches(benchmark: tuple[dict[str, Any], str]) -> None:
    """The same model and batch: plain DeepSpeed and `policy: all` have the same loss, within bf16."""
    results, _ = benchmark
    samples = results["offload"]["cpu"]["samples"]
    plain = {sample["round"]: sample["loss"] for sample in samples["plain"]}
    for sample in samples["all"]:
        assert sample["loss"] == pytest.approx(plain[sample["round"]], rel=1e-2)  # bf16 has 8 bits


def test_rows_that_share_a_process_do_what_they_do_apart(benchmark: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    rows = ("exploit-20", "floor-20", "all")
    done = run_benchmark("--together", "--offload", "cpu", "--rows", *rows, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    shared = json.loads((tmp_path / "benchmark.json").read_text())
    timed = {"seconds", "cpu_seconds", "cpu_seconds_of", "planning_seconds", "calibration_cpu_seconds", "peak_bytes"}
    for row in ("plain", *rows):
        apart, together = (
            [{key: each[key] for key in each.keys() - timed} for each in results["offload"]["cpu"]["samples"][row]]
            for results in (benchmark[0], shared)
        )
        assert together == apart[:STEPS]
        assert shared["offload"]["cpu"]["rows"][row]["peak_bytes"] is None
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["zero2-cpu-plain+exploit-20+floor-20+all.log"]
    assert shared["workload"]["rows_share_a_process"] and not benchmark[0]["workload"]["rows_share_a_process"]
    assert "no peak of rows that share a process" in done.stdout and "no peak" not in benchmark[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage, mode_name", [(2, "none"), (3, "zero3-none")])
def test_the_bars_are_judged_by_rows_that_share_a_process(stage: int, mode_name: str, tmp_path: Path) -> None:
    done = run_benchmark("--bars", "--stage", str(stage), "--offload", "none", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    mode = json.loads((tmp_path / "benchmark.json").read_text())["offload"][mode_name]
    assert all(row["peak_bytes"] is None for row in mode["rows"].values())
    assert len(list((tmp_path / "logs").iterdir())) == 4
    judged = {bar["name"] for bar in mode["bars"]}
    phases = {f"{row} optimizer / plain optimizer - share" for row in (*EXPLOIT_ROWS, "modules-3")}
    assert phases | {"policy all step / plain step", "matrices-20 step / layers-20 step"} <= judged


@pytest.mark.slow
def test_visiting_states_move_what_the_selection_says(tmp_path: Path) -> None:
    rows = ("exploit-20", "visit-20", "explore-20")
    done = run_benchmark("--offload", "none", "--rows", *rows, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    mode = json.loads((tmp_path / "benchmark.json").read_text())["offload"]["none"]
    assert set(mode["rows"]) == {"plain", *rows}
    bars = {bar["name"]: bar["value"] for bar in mode["bars"]}
    assert bars["visit-20 resident state bytes, off 12 bytes an element selected"] == 0
    assert bars["visit-20 bytes moved, off the states of the blocks that changed"] == 0
    assert bars["visit-20 planning / step"] > 0
    assert 0 < bars["explore-20 most gradient bytes / bytes of the k + 1 largest blocks"] <= 1
    assert all(sample["resident_state_bytes"] > 0 for sample in mode["samples"]["visit-20"])


@pytest.mark.slow
def test_zero3_has_its_rows_and_bars(tmp_path: Path) -> None:
    done = run_benchmark("--stage", "3", "--offload", "cpu", "--rows", "exploit-20", "all", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    mode = json.loads((tmp_path / "benchmark.json").read_text())["offload"]["zero3-cpu"]
    assert set(mode["rows"]) == {"plain", "exploit-20", "all"} and "ZeRO-3, offload_optimizer cpu" in done.stdout
    bars = {bar["name"]: bar for bar in mode["bars"]}
    assert bars["exploit-20 step / plain step"]["limit"] == 0.75
    assert bars["exploit-20 gradient bytes / bytes of the selected blocks"]["value"] == 1.0
    assert len(bars) == 4


@pytest.mark.slow
def test_rows_of_gast_are_compared_with_the_steps_that_learn_from_all_rows(tmp_path: Path) -> None:
    limits = {"random-20": 1.03, "align-20": 1.35, "random-all": 1.03, "align-all": 1.5}
    done = run_benchmark("--offload", "none", "--rows", "exploit-20", "all", *limits, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    mode = json.loads((tmp_path / "benchmark.json").read_text())["offload"]["none"]
    bars = {bar["name"]: bar["limit"] for bar in mode["bars"]}
    for row, limit in limits.items():
        base = "all" if row.endswith("all") else "exploit-20"
        assert bars[f"{row} step / {base} step"] == limit
        blocks, of_base = ([sample["blocks"] for sample in mode["samples"][name]] for name in (row, base))
        assert blocks == of_base  # they draw the same blocks, and differ by their rows alone


@pytest.mark.slow
def test_rows_of_sparse_grad_are_compared_with_the_steps_that_train_whole_matrices(tmp_path: Path) -> None:
    rows = {"sparse-20": ("exploit-20", 1.10), "sparse-all": ("all", 1.15)}
    done = run_benchmark("--offload", "none", "--rows", "exploit-20", "all", *rows, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    mode = json.loads((tmp_path / "benchmark.json").read_text())["offload"]["none"]
    bars = {bar["name"]: bar for bar in mode["bars"]}
    for row, (base, limit) in rows.items():
        assert bars[f"{row} step / {base} step"]["limit"] == limit
        assert bars[f"{row} step / {base} step, processor time"]["value"] > 0
        blocks, of_base = ([sample["blocks"] for sample in mode["samples"][name]] for name in (row, base))
        assert blocks == of_base  # calibration is over before the first round
    assert bars["sparse-all calibration / all step, processor time"]["limit"] == 20
    assert mode["rows"]["sparse-all"]["state_bytes"] < mode["rows"]["all"]["state_bytes"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--rows", "align-20"), "--rows align-20 needs exploit-20"),
        (("--rows", "all", "align-all", "--micro-batch", "1"), "--micro-batch=1 leaves the rows of GAST no choice"),
    ],
)
def test_rows_of_gast_that_mean_nothing_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_a_floor_without_the_row_it_follows_is_refused() -> None:
    done = run_benchmark("--rows", "floor-20")
    assert done.returncode == 2
    assert "needs exploit-20" in done.stderr
