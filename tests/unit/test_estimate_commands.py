"""The commands `ds-agsel estimate` and `ds-agsel check`: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_agsel import cli
from ds_agsel.ds_config import read_ds_config
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.models import known_models

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(known_models()["smollm2"] | {"num_hidden_layers": 2}))
    return file


def test_the_command_estimate(config_file, capsys):
    command = ["estimate", "--model", str(config_file), "--ds-config", str(CONFIGS / "zero2_offload.json")]
    assert cli.main([*command, "--select-percent", "25", "50", "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "2 ranks" in text and "25 %, exploit, expected" in text and "LoRA r=256" in text
    assert cli.main([*command, "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert {row["select_percent"] for row in form["rows"]} == {None, 20.0}  # the file's own


def test_estimate_begins_with_what_fits_and_what_to_run_next(config_file, capsys):
    """By the bytes of its own table: those of the largest step."""
    command = ["estimate", "--model", str(config_file), "--ds-config", str(CONFIGS / "zero2_offload.json")]
    assert cli.main([*command, "--json", "--ranks", "2"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["stepping"] == "host"]
    rows = [row for row in rows if row["method"] == "ds_agsel"]
    card, host = (max(row["bytes"][place]["total"] for row in rows) / 2**30 for place in ("accelerator", "host"))
    machine = ["--card", "8GiB,10,100,4x16", "--host-memory", "1MiB", "--ranks", "2"]
    assert cli.main([*command, *machine]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert f"needs {card:.1f} GiB of each card, activations not counted, and {2 * host:.1f} GiB of host" in first
    assert f"{8 - card:.1f} GiB of the card are left; {2 * host - 2**-10:.1f} GiB of host memory are missing" in first
    assert first.endswith("searches what fits.")
    assert cli.main([*command, "--card", "rtx4909"]) == 2
    assert "--card=rtx4909 is not known here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ds-config", "missing.json"], "missing.json can't be read as a ds_config: No such file"),
        (["--ds-config", str(CONFIGS / "zero2.json"), "--select-percent", "140"], "140 is outside (0, 100]"),
        (["--ds-config", str(CONFIGS / "zero2.json"), "--ranks", "-1"], "--ranks=-1"),
    ],
)
def test_the_command_estimate_refuses(config_file, capsys, arguments, message):
    assert cli.main(["estimate", "--model", str(config_file), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.name)
def test_our_own_configs_are_sound(file, capsys):
    assert cli.main(["check", str(file), "--model", "smollm2"]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: sound\n")


UNSOUND: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 0,
        "reduce_bucket_sice": 1,
        "elastic_checkpoint": True,
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
    },
    "optimizer": {"type": "Lion"},
    "adagrad_select": {
        "select_percent": 140,
        "seed": -1,
        "polcy": "all",
    },
}


def test_check_names_all_problems_one_a_line(tmp_path, capsys):
    file = tmp_path / "unsound.json"
    file.write_text(json.dumps(UNSOUND))
    assert cli.main(["check", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    expected = [
        'adagrad_select has no field "polcy". Did you mean "policy"?',
        "adagrad_select.select_percent=140 is outside (0, 100].",
        "adagrad_select.seed=-1 is outside [0, inf).",
        "zero_optimization.reduce_bucket_sice=1 is refused by DeepSpeed",
        "zero_optimization.stage=0 can't be used",
        "offload_optimizer.ratio=0.5 can't be used",
        "elastic_checkpoint=true can't be used",
        "optimizer.type='Lion' can't be used",
    ]
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith(f"{file}: ") and text in line


@pytest.mark.parametrize(
    ("section", "model", "expected"),
    [
        ({"policy": "adagard_select"}, False, ['policy="adagard_select" is unknown. Did you mean "adagrad_select"?']),
        (
            {"always_select": ["embeding"], "never_select": ["layers"]}, True,
            ['"embeding", which is not a block', '"layers", which is not a block'],
        ),
        ({"step_device": "cpu"}, False, ["step_device='cpu' and zero_optimization.offload_optimizer.device='none'"]),
        ({"blocks": {"all": ["model.*layers.*"]}}, True, ["leaves 2 trainable parameters"]),
        (
            {"always_select": ["head"], "never_select": ["head"], "fixed_blocks": []}, False,
            ['both name "head"', "fixed_blocks=[] is only for", "fixed_blocks=[] is empty"],
        ),
    ],
)  # fmt: skip
def test_check_looks_at_the_section_and_at_the_model(tmp_path, config_file, capsys, section, model, expected):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "adagrad_select": section}))
    assert cli.main(["check", str(file), *(["--model", str(config_file)] if model else [])]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected)
    assert all(text in line for text, line in zip(expected, lines, strict=True))


def test_check_says_where_there_is_no_section(tmp_path, capsys):
    file = tmp_path / "plain.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "adagrad_selct": {}}))
    assert cli.main(["check", str(file)]) == 1
    assert 'Did you mean "adagrad_select"?' in capsys.readouterr().out
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert cli.main(["check", str(file)]) == 1
    assert 'no section "adagrad_select"' in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1]", "{"])
def test_what_is_no_ds_config_is_refused(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"file\.json"):
        read_ds_config(file)
