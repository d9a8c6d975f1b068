"""How a run turned examples into prompts, kept in its model's folder, so that an evaluation asks in the same way."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ds_agsel.errors import ConfigError

FILE = "ds_agsel_run.json"
# How every prompt is made; then what only matters for the run's own data set.
PROMPTING = ("chat_template", "system")
OF_THE_DATA = (
    "dataset_config", "prompt_column", "completion_column", "prompt_template", "test_split", "builtin_level", "seed",
)  # fmt: skip


def as_text(options: argparse.Namespace) -> str:
    """Return the file's text for a run of ``options``."""
    names = ("dataset", *PROMPTING, *OF_THE_DATA)
    return json.dumps({name: getattr(options, name) for name in names}, indent=1) + "\n"


def read(model: str) -> dict[str, Any]:
    """Return the settings of the run that made the model in folder ``model``; empty if no run of ours did.

    Raises ConfigError for a damaged file.
    """
    file = Path(model) / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {error}. Remove it, and give its settings as options.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object. Remove it, and give its settings as options.")
    return found
