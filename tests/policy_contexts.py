"""Policies for tests, and selection files for `replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_agsel import policies
from ds_agsel.config import SelectionConfig
from ds_agsel.policies import Policy, PolicyContext


def context(num_blocks: int = 6, k: int = 2, steps_per_epoch: int | None = 100, **section: Any) -> PolicyContext:
    names = tuple(f"layers.{index}" for index in range(num_blocks))
    return PolicyContext(SelectionConfig(**section), num_blocks, k, names, steps_per_epoch)


def make(*args: Any, **kwargs: Any) -> Policy:
    return policies.create(context(*args, **kwargs))


def selection_file(folder: Path, *lines: object) -> str:
    path = folder / "selection.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)
