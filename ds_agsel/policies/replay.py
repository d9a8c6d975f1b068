"""The selections of an earlier run, step by step, for clean ablations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_agsel.config import SECTION
from ds_agsel.errors import ConfigError
from ds_agsel.policies.base import Policy, PolicyContext
from ds_agsel.policies.registry import register


@register("replay")
class Replay(Policy):
    """The blocks that ``replay_file``, a selection.jsonl, has for each step, known before the forward."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._path = str(context.config.replay_file)  # which the section requires of this policy
        indices = range(context.num_blocks) if context.block_indices is None else context.block_indices
        _refuse_other_blocks(self._path, dict(zip(indices, context.block_names, strict=True)))
        self._selections = _read(self._path, {block: place for place, block in enumerate(indices)})

    @property
    def max_selected(self) -> int:
        return max(map(len, self._selections.values()))

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        if step not in self._selections:
            raise ConfigError(
                f"{_setting(self._path)} has no step {step}; its steps are {min(self._selections)} to "
                f"{max(self._selections)}. Train no further than the run that wrote it."
            )
        return self._selections[step]


def _refuse_other_blocks(path: str, names: Mapping[int, str]) -> None:
    """Raise ConfigError if the blocks.json beside ``path`` has other blocks than ``names``, by index; none is no error.

    The file's indices would mean other blocks here, as those of a run of another granularity do.
    """
    try:
        listed = json.loads(Path(path).with_name("blocks.json").read_text(encoding="utf-8"))["blocks"]
        there = {block["index"]: block["name"] for block in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for index, name in names.items():
        if there.get(index, name) != name:
            raise ConfigError(
                f'{_setting(path)} was written with other blocks: {index} is "{there[index]}" there and "{name}" here. '
                f"Use the model, {SECTION}.granularity and {SECTION}.blocks of that run."
            )


def _read(path: str, places: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{_setting(path)} can't be read: {error}. Use the path of an earlier run's selection.jsonl."
        ) from error
    selections: dict[int, tuple[int, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step, blocks = _record(json.loads(line), places)
            if selections.setdefault(step, blocks) != blocks:
                raise ValueError(f"step {step} stands in an earlier line with other blocks")
        except ValueError as error:
            raise ConfigError(
                f'{_setting(path)}, line {number}: {error}. A line is {{"step": 0, "phase": "exploit",'
                ' "blocks": [3, 7]}.'
            ) from None
    if not selections:
        raise ConfigError(f"{_setting(path)} is empty. Use the selection.jsonl of a run that took a step.")
    return selections


def _record(record: Any, places: Mapping[int, int]) -> tuple[int, tuple[int, ...]]:
    """Return a line's step and its blocks as places in the lottery; the file has their indices in the model."""
    if not isinstance(record, dict) or "step" not in record or "blocks" not in record:
        raise ValueError('it is not an object with "step" and "blocks"')
    step, blocks = record["step"], record["blocks"]
    if type(step) is not int or step < 0:
        raise ValueError(f'"step" is {step!r}, not an integer from 0 on')
    if not isinstance(blocks, list) or not blocks or any(type(block) is not int for block in blocks):
        raise ValueError(f'"blocks" is {blocks!r}, not a list of block indices')
    if len(set(blocks)) < len(blocks):
        raise ValueError(f'"blocks" is {blocks!r}, which names a block twice')
    strange = [block for block in blocks if block not in places]
    if strange:
        first, last = min(places), max(places)
        known = f"{first} to {last}" if len(places) == last - first + 1 else f"{sorted(places)}"
        raise ValueError(f'"blocks" is {blocks!r}, and the blocks that can be chosen here are {known}')
    return step, tuple(sorted(places[block] for block in blocks))


def _setting(path: str) -> str:
    return f"{SECTION}.replay_file={json.dumps(path)}"
