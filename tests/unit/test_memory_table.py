"""The table of measured and estimated memory: it says which are far apart."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from ds_agsel.config import parse_section
from launch.benchmarking import memory
from launch.benchmarking.memory import CONFIGURATIONS, MIB, SECTION, table


def test_what_is_beyond_ten_percent_is_marked() -> None:
    held = {"after_backward": 111 * MIB, "after_backward_estimated": 100 * MIB, "peak": 1900 * MIB}
    row = table({"a": {**held, "peak_estimated": 2000 * MIB}}).splitlines()[-1]
    assert row == "| a | 111 | 100 | 1.11, beyond 10 % | 1,900 | 2,000 | 0.95 |"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_are_sound(name: str) -> None:
    parse_section({**SECTION, **CONFIGURATIONS[name][2]})


def test_a_process_that_was_killed_is_named_and_the_others_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        held = '{"after_backward": 1, "after_backward_estimated": 1, "peak": 1, "peak_estimated": 1}'
        is_killed = command[-1] == "ZeRO-3, offload"
        return subprocess.CompletedProcess(command, -9 if is_killed else 0, f"noise\n{held}\n")

    monkeypatch.setattr(memory.subprocess, "run", run)
    assert memory.main([]) == 1
    said = capsys.readouterr()
    assert said.out.count("1.00 |\n") == len(CONFIGURATIONS) - 1
    assert "ZeRO-3, offload: ended with -9" in said.err
