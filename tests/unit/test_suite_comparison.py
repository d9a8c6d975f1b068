"""What tests/deepspeed_suite makes of two runs of DeepSpeed's tests, and which calls it sends through ds_agsel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_suite import agsel_suite_shim as shim
from deepspeed_suite.comparison import Difference, compare, compare_engines, not_run, read_engines, read_table

SUITE = Path(__file__).resolve().parents[1] / "deepspeed_suite"
PLAIN = {"a.py::T::one[1]": "passed", "a.py::T::one[2]": "passed", "a.py::T::two": "skipped", "a.py::three": "failed"}
NAME = "ds_agsel's engine has another name"


def test_the_same_outcomes_are_no_problem():
    assert compare(PLAIN, dict(PLAIN), [], "all") == []


@pytest.mark.parametrize(
    ("test", "outcome"), [("a.py::T::one[1]", "failed"), ("a.py::T::two", "passed"), ("a.py::three", "passed")]
)
def test_an_unknown_difference_is_named(test, outcome):
    (problem,) = compare(PLAIN, {**PLAIN, test: outcome}, [], "all")
    assert test in problem and outcome in problem and PLAIN[test] in problem


def test_a_test_that_did_not_run_differs():
    (problem,) = compare(PLAIN, {test: end for test, end in PLAIN.items() if test != "a.py::T::two"}, [], "all")
    assert problem.startswith("a.py::T::two: not run")
    assert len(compare(PLAIN, {**PLAIN, "a.py::new": "passed"}, [], "all")) == 1


@pytest.mark.parametrize("row", ["a.py::T::one[1]", "a.py::T::one", "a.py::T", "a.py"])
def test_a_known_difference_is_no_problem(row):
    selective = {**PLAIN, "a.py::T::one[1]": "failed"}
    assert compare(PLAIN, selective, [Difference(row, "all", "failed", NAME)], "all") == []
    assert compare(PLAIN, selective, [Difference(row, "*", "failed", NAME)], "all") == []
    assert len(compare(PLAIN, selective, [Difference(row, "cyclic", "failed", NAME)], "all")) == 1


def test_another_outcome_than_the_known_one_is_a_problem_and_so_is_the_unused_row():
    problems = compare(
        PLAIN, {**PLAIN, "a.py::T::two": "failed"}, [Difference("a.py::T::two", "all", "passed", NAME)], "all"
    )
    assert len(problems) == 2 and all(NAME in problem for problem in problems)


def test_a_row_of_tests_that_are_not_in_this_run_is_left_alone():
    rows = [Difference("b.py::four", "all", "failed", NAME), Difference("a.py::T::on", "all", "failed", NAME)]
    assert compare(PLAIN, dict(PLAIN), rows, "all") == []


def test_engines_are_counted():
    known = {("a.py", "all"): 4}
    assert compare_engines({"a.py": 4, "b.py": 0}, known, "all") == []
    assert compare_engines({"a.py": 3}, known, "cyclic") == []
    assert compare_engines({"a.py": 3}, known, "all") == ["a.py: 3 engines engaged, expected 4"]
    assert compare_engines({"b.py": 0}, known, "all") == ["no engine was engaged: nothing of ds_agsel was tried"]


def test_a_file_without_a_test_that_ran_is_a_problem():
    assert not_run(["a.py"], PLAIN) == []
    (empty, broken) = not_run(["a.py", "b.py", "c.py"], {**PLAIN, "c.py": "not collected"})
    assert empty.startswith("b.py: no test ran") and broken.startswith("c.py: no test ran")


@pytest.mark.parametrize("row", ["a.py,all,failed,", "a.py,all,broken,why", ",all,failed,why"])
def test_a_row_without_test_outcome_or_reason_is_refused(tmp_path, row):
    table = tmp_path / "expected.csv"
    table.write_text(f"test,policy,outcome,reason\n{row}\n")
    with pytest.raises(ValueError, match=r"expected\.csv:2"):
        read_table(table)


def test_our_tables_are_read():
    read_table(SUITE / "expected.csv")
    read_engines(SUITE / "engines.csv")


def test_without_a_checkout_it_says_so_and_succeeds():
    done = subprocess.run([sys.executable, str(SUITE / "run.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" in done.stdout and "TESTS=" in done.stdout


ZERO = {"train_batch_size": 1, "zero_optimization": {"stage": 2}}
ADAM = {"optimizer": {"type": "Adam", "params": {}}}


@pytest.mark.parametrize(
    ("eligible", "changes"),
    [
        (True, {}),
        (True, {"config": None, "config_params": {**ZERO, **ADAM}}),
        (True, {"config": ZERO, "optimizer": torch.optim.AdamW([torch.ones(1)])}),
        (False, {"optimizer": torch.optim.SGD([torch.ones(1)])}),
        (False, {"config": {**ZERO, "optimizer": {"type": "Lamb", "params": {}}}}),
        (False, {"config": ZERO}),
        (False, {"config": {**ADAM, "zero_optimization": {"stage": 0}}}),
        (False, {"config": {**ZERO, **ADAM, "adagrad_select": {}}}),
        (False, {"config": "ds_config.json"}),
        (False, {"model": None}),
    ],
)
def test_which_calls_are_eligible(eligible, changes):
    arguments = {"model": torch.nn.Linear(1, 1), "config": {**ZERO, **ADAM}, **changes}
    assert shim.is_eligible(arguments) is eligible
