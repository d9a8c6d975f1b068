"""The command `ds-agsel fit`: what it writes is sound, what it can't do is said in a sentence."""

from __future__ import annotations

import json

import pytest

from ds_agsel import cli
from ds_agsel.config import SECTION
from ds_agsel.entry.check import problems_of
from ds_agsel.estimate.fit_config import ds_config_of
from ds_agsel.estimate.models import known_models
from ds_agsel.estimate.setting import AXES, settings

SMALL = ["--sequence-length", "512", "--tokens-per-step", "1024", "--micro-batch-size", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(known_models()["smollm2"] | {"num_hidden_layers": 3}))
    return str(folder)


@pytest.fixture(autouse=True)
def fewer_axes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A search of a tenth of the time; `test_fit` and the slow tests have the others."""
    if request.node.get_closest_marker("slow"):
        return
    fewer = {"select_percent": (50.0, 10.0), "explore_on": ("batch",), "unit": ("block",), "stage": (2, 3)}
    monkeypatch.setattr("ds_agsel.estimate.setting.AXES", {**AXES, **fewer})


PAIRS = [
    ("smollm2", "rtx3060", "16GiB"),
    ("qwen2.5-0.5b", "rtx3070", "16GiB"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [
        ("llama-3.1-8b", "rtx4090", "32GiB"), ("qwen2.5-1.5b", "rtx3060", "32GiB"), ("qwen2.5-7b", "h100", "256GiB"),
        ("phi-4-mini", "a10", "64GiB"), ("gemma-2-2b", "rtx4060ti", "32GiB"), ("llama-3.1-70b", "h200", "2TiB"),
    ]),
]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "card", "host"), PAIRS)
def test_what_it_writes_is_sound(name, card, host, tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    command = ["fit", "--model", name, "--card", card, "--host-memory", host, "--output", str(file)]
    assert cli.main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{name} fits ") and str(file) in last
    assert cli.main(["check", str(file), "--model", name]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: sound\n")  # units that are no blocks are listed after it


def test_every_setting_that_is_tried_is_sound():
    axes = {**AXES, "select_percent": (20.0,), "micro_batch_size": (2,), "checkpointing": (False,)}
    tried = list(settings(axes))
    assert len(tried) > 40
    for setting in tried:
        assert problems_of(ds_config_of(setting, 4, "/local_nvme")) == [], setting


def test_a_file_that_is_there_is_kept(model, tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    file.write_text("mine")
    command = ["fit", "--model", model, "--card", "a100", "--host-memory", "64GiB", *SMALL, "--output", str(file)]
    assert cli.main(command) == 2
    assert file.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert json.loads(file.read_text())[SECTION]["policy"] == "adagrad_select"


def test_nothing_fits(model, tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    command = ["fit", "--model", model, "--card", "1GiB,10,100,4x16", "--host-memory", "2GiB", *SMALL]
    assert cli.main([*command, "--output", str(file)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "does not fit" in last and "GiB more" in last and "next: " in last
    assert not file.exists()


def test_without_nvme_no_setting_has_it(model, tmp_path, capsys):
    command = ["fit", "--model", model, "--card", "a100", "--host-memory", "64GiB", *SMALL, "--show", "99"]
    assert cli.main(command) == 0
    assert "states on NVMe" in capsys.readouterr().out
    assert cli.main([*command, "--no-nvme"]) == 0
    assert "NVMe  " not in capsys.readouterr().out.replace("NVMe GiB", "")
    assert cli.main([*command, "--nvme", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--card", "rtx4909"], "--card=rtx4909 is not known here. Did you mean"),
        (["--card", "auto"], "--card=auto: this machine's accelerator is the processor"),
        (["--host-memory", "32"], "--host-memory=32 is not an amount of memory. Write it with its unit: 32GiB."),
        (["--ranks", "0"], "--ranks=0 is not above 0"),
        (["--micro-batch-size", "many"], "--micro-batch-size=many is not a number of rows"),
        (["--tokens-per-step", "1000"], "--tokens-per-step=1000 is not a multiple of"),
        (["--nvme", "/no/such/folder"], "--nvme=/no/such/folder is not a folder"),
        (["--nvme", "/tmp", "--no-nvme"], "--nvme and --no-nvme exclude each other"),
        (["--host-gb-per-second", "nan"], "--host-gb-per-second=nan is not above 0"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(model, capsys, options, message):
    command = ["fit", "--model", model, "--card", "a100", "--host-memory", "64GiB", "--sequence-length", "512"]
    assert cli.main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
