"""What the wheel holds, and the commands that start it: held to the tree and to DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

from ds_agsel import cli, launching, starting_config
from ds_agsel.ds_config import DsConfig, read_ds_config

ROOT = Path(__file__).parents[2]
# Parts of launch/ that read files of a clone: configs/, docs/. They stay out of the wheel.
OF_A_CLONE = {
    "ds_agsel.launch.examples",
    "ds_agsel.launch.gpu_check",
    "ds_agsel.launch.pages",
    "ds_agsel.launch.reproduction",
}


def packages_below(folder: Path, name: str) -> set[str]:
    found = {path.parent for path in folder.rglob("*.py")}
    return {".".join((name, *path.relative_to(folder).parts)) for path in found}


def test_the_wheel_s_packages_are_those_of_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    ours = packages_below(ROOT / "ds_agsel", "ds_agsel") | packages_below(ROOT / "launch", launching.PACKAGE)
    assert set(listed["packages"]) == ours - OF_A_CLONE and len(listed["packages"]) == len(ours - OF_A_CLONE)
    assert listed["package-dir"] == {launching.PACKAGE: "launch"}


def test_nothing_in_the_wheel_imports_what_stays_in_the_clone() -> None:
    """But reproduce.py, which says so; and nothing imports `launch` by its absolute name."""
    for path in sorted((ROOT / "launch").rglob("*.py")):
        package = f"ds_agsel.{'.'.join(path.parent.relative_to(ROOT).parts)}"
        if package in OF_A_CLONE or path.name == "reproduce.py":
            continue
        text = path.read_text()
        assert "from launch" not in text and "reproduction" not in text.replace("reproduction.md", ""), path


def test_the_launcher_s_options_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import runner

    parsers: list[argparse.ArgumentParser] = []

    def caught(parser: argparse.ArgumentParser, *_: object, **__: object) -> argparse.Namespace:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    with pytest.raises(SystemExit):
        runner.parse_args([])
    flags, valued = set(), set()
    for action in parsers[0]._actions:
        (flags if action.nargs == 0 else valued).update(action.option_strings)
    # What we set ourselves, or answer.
    assert flags - {"-h", "--help", "--module", "--no_python"} == launching.LAUNCHER_FLAGS
    assert valued == launching.LAUNCHER_OPTIONS


def test_options_go_to_the_launcher_or_to_training() -> None:
    words = [
        "--lr",
        "1e-4",
        "--num_accelerators",
        "2",
        "--model",
        "m",
        "--hostfile=hosts",
        "--no_ssh",
        "--output",
        "o",
        "-q",
    ]
    to_launcher, to_training = launching.split(words)
    assert to_launcher == ["--num_accelerators", "2", "--hostfile=hosts", "--no_ssh", "-q"]
    assert to_training == ["--lr", "1e-4", "--model", "m", "--output", "o"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_clone_is_started_by_path_and_a_wheel_by_module(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda _: object() if installed else None)
    command = launching.train_command(["--num_gpus", "1", "--lr", "1"])
    script = ["--module", "ds_agsel.launch.train"] if installed else [str(ROOT / "launch" / "train.py")]
    assert command[1:] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", *script, "--lr", "1"]
    script = ["-m", "ds_agsel.launch.evaluate"] if installed else [str(ROOT / "launch" / "evaluate.py")]
    assert launching.evaluate_command(["--help"])[1:] == [*script, "--help"]
    assert "deepspeed.launcher.runner" not in launching.train_command(["--help"])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [True, False])
def test_init_writes_what_we_and_deepspeed_read(
    stage: int, offload: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    file = tmp_path / "ds_config.json"
    words = [
        "init",
        str(file),
        "--stage",
        str(stage),
        "--select-percent",
        "12.5",
        *([] if offload else ["--no-offload"]),
    ]
    assert cli.main(words) == 0
    ours = read_ds_config(file)
    with open(file) as opened:  # as deepspeed/runtime/config.py does
        assert hjson.load(opened, object_pairs_hook=dict_raise_error_on_duplicate_keys) == ours
    read = DsConfig.of(ours)
    assert (read.stage, read.offload_optimizer.is_on) == (stage, offload)
    assert ours["adagrad_select"]["select_percent"] == 12.5
    assert cli.main(words) == 2 and "exists. Give another file, or --overwrite." in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


def test_every_setting_of_the_starting_config_has_a_comment_above_its_part() -> None:
    lines = starting_config.text().splitlines()
    assert sum(line.strip().startswith("//") for line in lines) >= 12
    assert max(map(len, lines)) <= 120
