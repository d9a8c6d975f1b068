"""The plan of the paper's experiments, what is read of its cells, the comparisons, and how its processes end."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_agsel.errors import ConfigError
from ds_agsel.estimate.models import known_models
from launch.methods import lora
from launch.reproduction import command, comparisons, cost, figures, plan, results, running, tables
from launch.reproduction.results import Accuracy, CellResult, Point
from launch.reproduction.running import Sweep

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
PUBLISHED = yaml.safe_load((CONFIGS / "published.yaml").read_text())
SMALL: dict[str, Any] = {
    "name": "small",
    "deepspeed_config": "configs/zero2.json",
    "steps": 10,
    "seeds": [1, 2],
    "reference": "ours",
    "time_limit_seconds": 60,
    "options": {"dataset": "builtin", "system": "", "packing": False, "micro-batch-size": 4},
    "models": {"m": {"model": "smollm2", "options": {"micro-batch-size": 2}}},
    "search": {"steps": 3, "seed": 0, "options": {"evaluate-every": 0}},
    "families": {"ours": {"learning_rates": [0.001, 0.01]}, "plain": {"learning_rates": [0.1]}},
    "methods": {
        "ours": {"method": "adagrad_select", "family": "ours", "options": {"select-percent": 20}},
        "lora": {"method": "lora", "family": "plain", "method_options": {"rank": 4}, "seeds": [1]},
        "full": {"method": "full", "family": "plain", "options": {"gradient-checkpointing": True}},
    },
}


def small(**changes: Any) -> plan.SweepPlan:
    return plan.SweepPlan(**{**copy.deepcopy(SMALL), **changes})


# -- the plan


@pytest.mark.parametrize("scale", command.SCALES)
def test_every_scale_can_be_read(scale: str) -> None:
    read = plan.read(CONFIGS / f"{scale}.yaml")
    assert read.name == scale
    cells = [*plan.search_cells(read), *plan.final_cells(read)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(Path(CONFIGS.parents[1] / config).is_file() for config in [read.deepspeed_config])


def test_the_paper_s_cells_are_in_full() -> None:
    read = plan.read(CONFIGS / "full.yaml")
    assert set(read.models) == {"qwen2.5-0.5b", "llama-3.2-1b", "phi-4-mini"}
    percents = {read.methods[f"adagrad_select_{percent}"].options["select-percent"] for percent in (10, 20, 30)}
    assert percents == {10, 20, 30}
    assert [read.methods[f"lora_{rank}"].method_options["rank"] for rank in (128, 256)] == [128, 256]
    swept = [m.options["select-percent"] for m in read.methods.values() if m.options.get("policy") == "gradient_topk"]
    assert (min(swept), max(swept)) == (5, 100)


def test_tiny_is_expected_to_take_less_than_45_minutes() -> None:
    read = plan.read(CONFIGS / "tiny.yaml")
    cells = [*plan.search_cells(read), *plan.final_cells(read)]
    seconds = plan.expected_seconds(read, cells)
    assert seconds is not None and seconds < 45 * 60


def test_cells_of_a_plan() -> None:
    names = [cell.name for cell in [*plan.search_cells(small()), *plan.final_cells(small())]]
    assert names == [
        "search/m/ours/lr-0.001", "search/m/ours/lr-0.01",
        "final/m/ours/seed-1", "final/m/lora/seed-1", "final/m/full/seed-1",
        "final/m/ours/seed-2", "final/m/full/seed-2",
    ]  # fmt: skip


def test_the_nearest_option_counts() -> None:
    read = small()
    final = plan.final_cells(read)
    assert plan.arguments(read, final[0], 0.01) == [
        "--method", "adagrad_select", "--deepspeed_config", "configs/zero2.json", "--model", "smollm2",
        "--dataset", "builtin", "--system", "", "--micro-batch-size", "2", "--select-percent", "20",
        "--lr", "0.01", "--seed", "1", "--steps", "10",
    ]  # fmt: skip
    lora = plan.arguments(read, final[1], 0.1)
    assert lora[:4] == ["--method", "lora", "--method-option", "rank=4"]
    full = plan.arguments(read, final[2], 0.1)
    assert full[full.index("--gradient-checkpointing") + 1] == "--lr"
    short = plan.arguments(read, plan.search_cells(read)[0], 0.001)
    assert short[-8:] == ["--evaluate-every", "0", "--lr", "0.001", "--seed", "0", "--steps", "3"]


def test_a_model_s_variation_of_a_method_counts_most() -> None:
    model = {"model": "big", "methods": {"full": {"deepspeed_config": "other.json", "options": {"packing": True}}}}
    read = small(models={"m": model})
    full = plan.arguments(read, plan.final_cells(read)[2], 0.1)
    assert full[3] == "other.json" and "--packing" in full
    assert "--packing" not in plan.arguments(read, plan.final_cells(read)[0], 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "theirs"}, "reference='theirs' is none of the methods"),
        ({"seeds": [2]}, "methods.lora.seeds has 1, seeds has not"),
        ({"steps": 0}, "steps=0: Input should be greater than or equal to 1"),
        ({"search": None}, "families.ours has learning rates to choose from, and there is no search"),
        ({"options": {"lr": 0.1}}, "The option lr is set by launch/reproduce.py"),
        ({"optoins": {}}, "optoins={}: Extra inputs are not permitted"),
        ({"models": {"a/b": {"model": "x"}}}, "'a/b' is no name"),
        ({"models": {"a": {}}}, "plan.yaml: models.a.model is missing. Add it, as configs/paper/tiny.yaml has it."),
    ],
)
def test_a_plan_that_can_t_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(ConfigError) as raised:
        plan.read(file)
    assert message in str(raised.value)


def test_the_command_line_refuses_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--file", "nowhere.yaml"]) == command.REFUSED
    assert capsys.readouterr().err == "error: nowhere.yaml can't be read: No such file or directory. " \
        "Give a YAML file of runs.\n"  # fmt: skip
    assert command.main(["--scale", "tiny", "--model", "nobody=here"]) == command.REFUSED
    assert "is not NAME=PATH with a NAME of smollm2" in capsys.readouterr().err


def test_the_lowest_loss_chooses_the_learning_rate() -> None:
    assert plan.choose_lr({0.1: 2.0, 0.01: 1.0, 1.0: None}) == 0.01
    assert plan.choose_lr({0.1: 1.0, 0.01: 1.0}) == 0.01
    assert plan.choose_lr({0.1: None}) is None


# -- what is in the folders


def write_cell(
    folder: Path, losses: list[float], processor: float = 1.0, faults: list[str] | None = None, right: int = 3
) -> None:
    """A whole run's files: a validation loss before the first and after each step, of two wall seconds."""
    run = folder / running.RUN
    run.mkdir(parents=True)
    records: list[dict[str, Any]] = [{"event": "validation", "step": 0, "loss": losses[0]}]
    for step, loss in enumerate(losses[1:]):
        seconds = {"seconds": 2.0, "processor_seconds": processor * (step + 1)}
        records.append({"event": "train", "step": step, "loss": loss, "phase": "plain", **seconds})
        records.append({"event": "validation", "step": step + 1, "loss": loss})
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    memory = {"host": 3 * 2**20, "host_in_steps": 2 * 2**20, "accelerator": 0}
    summary = {"peak_memory_bytes": memory, "optimizer_state_bytes": 2**20, "gradient_bytes": 0, "faults": faults}
    (run / "summary.json").write_text(json.dumps(summary))
    answers = [{"correct": number < right} for number in range(4)]
    (run / "answers_after.jsonl").write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))


def mark(sweep: Sweep, cell: plan.Cell, lr: float, message: str | None = None) -> None:
    arguments = sweep._fingerprint(cell, lr)
    state = "failed" if message else "done"
    outcome = {"state": state, "lr": lr, "message": message, "seconds": 9.0, "arguments": arguments}
    sweep.folder(cell).mkdir(parents=True, exist_ok=True)
    (sweep.folder(cell) / f"{state}.json").write_text(json.dumps(outcome))


@pytest.fixture
def swept(tmp_path: Path) -> Sweep:
    """A sweep with both short runs done and all final cells but seed 2's; LoRA failed."""
    sweep = Sweep(small(), tmp_path, lambda _: None)
    for cell, loss in zip(plan.search_cells(sweep.plan), (1.0, 0.5)):
        write_cell(sweep.folder(cell), [2.0, loss])
        mark(sweep, cell, cell.lr)
    ours, lora, full = plan.final_cells(sweep.plan)[:3]
    write_cell(sweep.folder(ours), [2.0, 1.0, 0.6], processor=1.0)
    mark(sweep, ours, 0.01)
    mark(sweep, lora, 0.1, "error: no such rank")
    write_cell(sweep.folder(full), [2.0, 1.2, 0.4], processor=4.0, faults=["It forgot."], right=4)
    mark(sweep, full, 0.1)
    return sweep


def test_learning_rates_come_from_the_short_runs(swept: Sweep) -> None:
    ours = plan.final_cells(swept.plan)[0]
    assert swept.lr_of(ours) == (0.01, "")
    assert swept.search_losses("m", "ours") == {0.001: 1.0, 0.01: 0.5}
    assert swept.lr_of(plan.final_cells(swept.plan)[1]) == (0.1, "")


def test_a_family_without_a_learning_rate_says_why(tmp_path: Path) -> None:
    sweep = Sweep(small(), tmp_path, lambda _: None)
    ours = plan.final_cells(sweep.plan)[0]
    assert sweep.lr_of(ours) == (None, "its learning rates were not all tried")
    for cell in plan.search_cells(sweep.plan):
        mark(sweep, cell, cell.lr, "error: no package")
    assert sweep.lr_of(ours) == (None, "error: no package")
    assert results.collect(sweep)[0].message == "error: no package"


def test_what_is_marked_is_not_run_again_unless_its_settings_changed(swept: Sweep, tmp_path: Path) -> None:
    ours, lora, *_, last = plan.final_cells(swept.plan)
    assert [swept.is_open(cell) for cell in (ours, lora, last)] == [False, False, True]
    retrying = Sweep(swept.plan, tmp_path, lambda _: None, retry=True)
    assert [retrying.is_open(cell) for cell in (ours, lora, last)] == [False, True, True]
    changed = Sweep(small(options={"dataset": "gsm8k"}), tmp_path, lambda _: None)
    assert changed.is_open(ours) and changed.is_open(lora)
    (swept.folder(plan.search_cells(swept.plan)[1]) / running.RUN / "metrics.jsonl").unlink()
    assert swept.lr_of(ours) == (0.001, "") and swept.is_open(ours)  # which was run at 0.01


@pytest.mark.parametrize(("loss", "finals"), [(0.7, []), (0.1, ["final/m/ours/seed-1"])])
def test_a_learning_rate_tried_later_reruns_what_it_changes(
    swept: Sweep, monkeypatch: pytest.MonkeyPatch, loss: float, finals: list[str]
) -> None:
    later, _ = plan.search_cells(swept.plan)
    ours = plan.final_cells(swept.plan)[0]
    shutil.rmtree(swept.folder(later))
    assert swept.is_open(ours)
    ran = []

    def train(cell: plan.Cell, lr: float) -> None:
        ran.append(cell.name)
        write_cell(swept.folder(cell), [2.0, loss])

    monkeypatch.setattr(swept, "_train_and_evaluate", train)
    swept.run([later, ours])
    assert ran == [later.name, *finals]


@pytest.mark.parametrize("of_plan, asked", [(1, 2), (2, None)])
def test_jobs_cells_run_at_once_the_final_ones_after_the_short_ones(
    of_plan: int, asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(small().model_copy(update={"jobs": of_plan}), tmp_path, lambda _: None, jobs=asked)
    both = threading.Barrier(2, timeout=30)
    ran = []

    def train(cell: plan.Cell, lr: float) -> None:
        both.wait()
        write_cell(sweep.folder(cell), [2.0, 1.0])
        ran.append(cell.kind)

    monkeypatch.setattr(sweep, "_train_and_evaluate", train)
    cells = [*plan.search_cells(sweep.plan), *plan.final_cells(sweep.plan)[:2]]
    sweep.run(cells)
    assert ran == ["search", "search", "final", "final"]
    assert not any(sweep.is_open(cell) for cell in cells)
    assert command.main(["--scale", "tiny", "--jobs", "0"]) == command.REFUSED


@pytest.mark.parametrize(("fails", "code"), [(None, command.CELLS_FAILED), ("no such rank", 0), ("else", 1)])
def test_a_failure_that_the_plan_foresees_is_none(swept: Sweep, tmp_path: Path, fails: str | None, code: int) -> None:
    settings = copy.deepcopy({**SMALL, "seeds": [1]})
    settings["methods"]["lora"]["fails"] = fails
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert command.main(["--file", str(file), "--output", str(tmp_path), "--report"]) == code


def test_cells_are_read(swept: Sweep) -> None:
    ours, lora, full, *rest = results.collect(swept)
    assert ours.points == (Point(0, 2.0, 0.0, 0.0), Point(1, 1.0, 2.0, 1.0), Point(2, 0.6, 4.0, 2.0))
    assert (ours.step_median, ours.step_p90, ours.processor_seconds, ours.lr) == (2.0, 2.0, 2.0, 0.01)
    assert (ours.peak_memory_bytes, ours.optimizer_state_bytes) == (3 * 2**20, 2**20)
    assert ours.accuracy[results.TEST] == Accuracy(3, 4)
    assert not lora.is_whole and lora.message == "error: no such rank"
    assert full.faults == ("It forgot.",)
    assert [m.message for m in rest] == ["not run yet"] * 2
    (swept.folder(plan.final_cells(swept.plan)[0]) / running.RUN / "summary.json").write_text("{")
    assert "its files can't be read" in str(results.collect(swept)[0].message)


def test_the_share_of_wrong_rows_among_the_taken_is_in_the_tables(swept: Sweep) -> None:
    run = swept.folder(plan.final_cells(swept.plan)[0]) / running.RUN
    (run / "wrong_rows.json").write_text("[3, 5]")
    (run / "blocks.json").write_text(json.dumps({"blocks": [{"name": "a", "numel": 1}]}))
    samples = {"rows": [4], "taken": {"0": [[0, 2]]}, "ids": [[3, 4, 6, 5]]}
    line = {"step": 0, "phase": "exploit", "blocks": [0], "samples": samples}
    (run / "selection.jsonl").write_text(json.dumps(line) + "\n")
    ours, *others = results.collect(swept)
    assert ours.wrong_share == 0.5 and all(cell.wrong_share is None for cell in others)
    page = tables.page(swept.plan, [ours, *others], [], {"source": "", "claims": []}, "")
    assert "| wrong rows among the taken, % |" in page and "| 50.0 |" in page


def test_an_evaluation_counts_instead_of_the_run_s_own_test(swept: Sweep) -> None:
    folder = swept.folder(plan.final_cells(swept.plan)[0]) / running.EVALUATIONS / "gsm8k"
    folder.mkdir(parents=True)
    (folder / "accuracy.json").write_text(json.dumps({"rows": 10, "correct": 7}))
    assert results.collect(swept)[0].accuracy == {"gsm8k": Accuracy(7, 10)}


# -- comparisons


def test_loss_at_a_processor_time_lies_between_the_measured() -> None:
    points = [Point(0, 4.0, 0, 0.0), Point(1, 2.0, 0, 10.0), Point(2, 1.0, 0, 30.0)]
    assert [results.loss_at(points, seconds) for seconds in (0, 5, 10, 20, 30, 99)] == [4, 3, 2, 1.5, 1, 1]
    assert results.loss_at([Point(0, 4.0, 0, None), Point(1, 2.0, 0, None)], 5) is None


def test_equal_processor_time_is_the_quickest_whole_run_s_without_a_fault(swept: Sweep) -> None:
    cells = results.collect(swept)
    assert results.shared_budget(cells) == 2.0
    found = results.losses_at_equal_time(cells)
    assert found == {("m", "ours", 1): 0.6, ("m", "full", 1): pytest.approx(1.6)}  # half of the way from 2.0 to 1.2
    assert results.losses_at_equal_steps(cells) == {("m", "ours", 1): 0.6, ("m", "full", 1): 0.4}


def test_the_same_seed_is_compared() -> None:
    losses = {("m", "ours", 1): 1.0, ("m", "ours", 2): 3.0, ("m", "full", 1): 1.5, ("m", "full", 2): 3.1}
    apart = results.against(losses, "m", "full", "ours")
    assert apart is not None and (apart.mean, apart.half, apart.count) == (pytest.approx(0.3), pytest.approx(0.2), 2)
    assert results.against({("m", "full", 1): 1.5}, "m", "full", "ours") is None


def test_accuracy_over_seeds_has_one_seed_s_interval() -> None:
    cells = [CellResult("m", "full", seed, accuracy={"d": Accuracy(right, 100)}) for seed, right in ((1, 40), (2, 60))]
    mean = results.mean_accuracy(cells, "m", "full", "d")
    assert mean == Accuracy(50, 100)


def test_tables_show_who_lost_and_who_failed(swept: Sweep) -> None:
    cells = results.collect(swept)
    page = tables.page(swept.plan, cells, results.chosen_rates(swept), PUBLISHED, "a machine")
    lines = page.splitlines()
    assert "| full † | 1 | 0.4000 | 1.6000 | -0.2000 | +1.0000 |" in lines
    assert "| full † | 100.0 [51.0, 100.0] of 4 | – |" in lines
    assert "| lora | 1 | **no result**: error: no such rank |" in lines
    assert "| full | 1 | It forgot. |" in lines
    assert "| ours | 2 | **no result**: not run yet |" in lines
    assert "| m | ours | 0.001: 1.0000, 0.01: 0.5000 | 0.01 | edge |" in lines
    assert "| ours | 2.00 | 2.00 | 1.00 | 1 | – | 0 | 3 | 2 | 9 |" in lines
    published = {**PUBLISHED, "accuracy": {results.TEST: {"m": {"full": 12.5}}}}
    assert "| full † | 100.0 [51.0, 100.0] of 4 | 12.5 |" in tables.page(swept.plan, cells, [], published, "")


def test_figures_are_drawn(swept: Sweep, tmp_path: Path) -> None:
    written = figures.draw_all(swept.plan, results.collect(swept), tmp_path / "figures")
    assert [path.name for path in written] == [
        "m_loss_by_step.png", "m_loss_by_wall_time.png", "m_loss_by_processor_time.png", "m_time_and_memory.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


# -- processes


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., str | None]:
    """Runs Python code as a cell's process would be; what went wrong."""

    def run(code: str, limit: float = 60) -> str | None:
        sweep = Sweep(small(time_limit_seconds=limit), tmp_path, lambda _: None)
        with open(tmp_path / "log.txt", "ab") as log:
            return sweep._call([sys.executable, "-c", code], log, time.monotonic() + limit, 3)

    return run


def test_the_error_of_a_process_is_found_in_its_log(call: Callable[..., str | None], tmp_path: Path) -> None:
    assert call("import os; print(os.environ['OMP_NUM_THREADS'])") is None
    assert (tmp_path / "log.txt").read_text().endswith("\n3\n")
    assert call("print('error: an older one'); raise ValueError('bad')") == "an older one"
    assert call("raise ValueError('bad')") == "ValueError: bad"
    assert call("raise SystemExit(7)") == "exit code 7, and no error in the log"


def test_a_process_past_its_limit_is_ended_with_its_children(call: Callable[..., str | None], tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    began = time.monotonic()
    assert call(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", 3) == (
        "stopped at the time limit of 3 s"
    )
    assert time.monotonic() - began < 25
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


# -- the cost


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-3.2-1b", "phi-4-mini"])
def test_lora_is_on_every_projection_of_the_paper_s_models(name: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**known_models()[name], **small, **heads}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    linears = sum(isinstance(module, nn.Linear) for module in model.model.layers.modules())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=lora._TARGETS, task_type="CAUSAL_LM"))
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == linears and linears in (2 * 7, 2 * 4)


def test_cost_of_full_scale() -> None:
    read = plan.read(CONFIGS / "full.yaml")
    found = {(price.model, price.method): price for price in cost.prices(read, plan.final_cells(read))}
    assert len(found) == len(read.models) * len(read.methods)
    assert all(price.accelerator_bytes < 48e9 for price in found.values()), "a cell does not fit: vary its ds_config"
    for model in read.models:
        hours = {method: found[model, method].hours for method in read.methods}
        assert hours["random_20"] < hours["adagrad_select_20"] < hours["gradient_topk_20"]
        assert hours["adagrad_select_20"] < hours["full"]
        alike = {f"adagrad_select_{percent}" for percent in (10, 20, 30)} - set(read.models[model].methods)
        held = [found[model, method].accelerator_bytes for method in sorted(alike)]
        assert held == sorted(held) and held[0] < held[-1]
    assert (
        found["qwen2.5-0.5b", "adagrad_select_30"].accelerator_bytes < found["qwen2.5-0.5b", "full"].accelerator_bytes
    )


def test_a_plan_without_assumptions_has_no_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--scale", "tiny", "--cost"]) == command.REFUSED
    assert "tiny has no section cost" in capsys.readouterr().err


def test_the_docs_have_the_paper_s_differences() -> None:
    page = (CONFIGS.parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [line for line in comparisons.published_lines(PUBLISHED) if line.startswith(("| gsm8k |", "| math |"))]
    assert len(rows) == 6
    for row in rows:
        assert row.split("|", 3)[3] in page, row
