"""An evaluation of a run's model asks as the run did, unless it is told otherwise."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from ds_agsel.errors import ConfigError
from launch.evaluation import run_settings
from launch.evaluation.options import EvaluationOptions, parse

RUN: dict[str, Any] = {
    "dataset": "builtin", "chat_template": "never", "system": "", "dataset_config": None, "prompt_column": None,
    "completion_column": None, "prompt_template": None, "test_split": None, "builtin_level": 1, "seed": 7,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / run_settings.FILE).write_text(run_settings.as_text(argparse.Namespace(**RUN)))
    return str(tmp_path)


def asked(model: str, *words: str) -> EvaluationOptions:
    return parse(["--model", model, "--output", "o", *words]).completed()


def test_what_is_not_given_is_the_run_s(model: str) -> None:
    found = asked(model)
    assert {name: getattr(found, name) for name in RUN} == RUN
    assert found.completed() == found


def test_what_is_given_is_kept(model: str) -> None:
    found = asked(model, "--system", "Be brief.", "--builtin-level", "3", "--chat-template", "auto")
    assert (found.system, found.builtin_level, found.chat_template) == ("Be brief.", 3, "auto")
    assert (found.dataset, found.seed) == ("builtin", 7)


def test_another_data_set_is_asked_with_the_run_s_prompts_alone(model: str) -> None:
    found = asked(model, "--dataset", "math")
    assert (found.dataset, found.system, found.chat_template) == ("math", "", "never")
    assert (found.builtin_level, found.seed) == (2, 42)


def test_without_a_run_or_its_settings_the_defaults_hold(model: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for found in (asked(str(tmp_path / "other")), asked("some/hub-name"), asked(model, "--without-run-settings")):
        assert (found.dataset, found.chat_template, found.system, found.builtin_level, found.seed) == (
            "gsm8k", "auto", None, 2, 42
        )  # fmt: skip


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_damaged_file_is_named(model: str, content: str) -> None:
    (Path(model) / run_settings.FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"ds_agsel_run\.json .*Remove it"):
        asked(model)
