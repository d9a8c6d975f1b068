"""The versions that we claim are those that are tested, wherever they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from ds_agsel.zero import compat
from ds_agsel.zero.compat import versions

ROOT = Path(__file__).parents[2]


def requirements() -> list[str]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["hf"]]


def bounds() -> dict[str, str]:
    """Package -> its lower bound in pyproject.toml."""
    return dict(re.match(r"([a-z-]+)>=([0-9.]+)", line).groups() for line in requirements())


def test_lower_bounds_are_the_oldest_versions_tested() -> None:
    tested = runpy.run_path(str(ROOT / "tests" / "compat" / "run.py"))
    claimed = bounds()
    for name, version in tested["ENDS"]["oldest"].items():
        assert version == f"{claimed[name]}.0"
        assert tested["ENDS"]["newest"][name] == ""  # whatever is newest
    assert claimed["deepspeed"] == compat.KNOWN_VERSIONS[0]
    assert tested["pinned"]()["deepspeed"] == compat.KNOWN_VERSIONS[-1]


def test_the_readme_names_both_ends() -> None:
    tested = runpy.run_path(str(ROOT / "tests" / "compat" / "run.py"))
    text = " ".join((ROOT / "README.md").read_text().split())
    for name, version in tested["ENDS"]["oldest"].items():
        assert f"{name} {version} and {tested['pinned']()[name]}" in text
    assert f"DeepSpeed {', '.join(compat.KNOWN_VERSIONS[:-1])} and {compat.KNOWN_VERSIONS[-1]}, with torch" in text


def test_deepspeeds_bounds_the_guards_releases_and_those_tried_agree() -> None:
    tested = runpy.run_path(str(ROOT / "tests" / "compat" / "run.py"))
    assert f"deepspeed>={compat.KNOWN_VERSIONS[0]},<{versions.TOO_NEW}" in requirements()
    assert tested["known_versions"]() == compat.KNOWN_VERSIONS
