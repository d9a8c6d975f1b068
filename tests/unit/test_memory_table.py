"""The table of measured and estimated memory: it says which are far apart."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from test_estimate import model_of

from ds_agsel.config import parse_section
from ds_agsel.estimate.memory import selective_memory
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.steps import exact_step
from launch.benchmarking import memory
from launch.benchmarking.memory import CONFIGURATIONS, MIB, SECTION, table


def test_what_is_beyond_ten_percent_is_marked() -> None:
    held = {("m", "a"): {"peak": 111 * MIB, "estimated": 100 * MIB}, ("m", "b"): {"peak": 1900, "estimated": 2000}}
    rows = table(held).splitlines()[-2:]
    assert rows == ["| m | a | 111 | 100 | 1.11, beyond 10 % |", "| m | b | 0 | 0 | 0.95 |"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_are_sound(name: str) -> None:
    parse_section({**SECTION, **CONFIGURATIONS[name][2]})


def test_a_process_that_was_killed_is_named_and_the_others_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        held = '{"peak": 1, "estimated": 1}'
        is_killed = command[-2:] == ["0.5b", "ZeRO-3, offload"]
        return subprocess.CompletedProcess(command, -9 if is_killed else 0, f"noise\n{held}\n")

    monkeypatch.setattr(memory.subprocess, "run", run)
    assert memory.main([]) == 1
    said = capsys.readouterr()
    assert said.out.count("1.00 |\n") == 2 * len(CONFIGURATIONS) - 1
    assert "0.5b, ZeRO-3, offload: ended with -9" in said.err


def test_with_zero_1_a_gradient_is_counted_in_one_form() -> None:
    """Of all that are whole in backward only the largest stands beside those in fp32; an update has none."""
    shape, setup = model_of((5,), (3,), (2,)), Setup(stage=1, offload_optimizer="cpu", rounds_page_locked=False)
    selection: Any = SimpleNamespace(history=[SimpleNamespace(phase="exploit", blocks=(0, 1, 2))])
    found = list(memory._estimates(shape, setup, selection, {}))
    both = []
    for moment, updated in (("backward", ()), ("update", (0, 1, 2))):
        held = selective_memory(
            shape, setup, "host", exact_step("exploit", 3, (0, 1, 2), (0, 1, 2), updated), moment=moment
        )
        both.append(held.accelerator.total + held.host.total)
    assert found == [both[0] + 8 * 5 - (3 + 2) * setup.item_bytes, both[1]]
