"""Known methods as sections: the fields that ``preset`` fills where the user leaves them out. docs/policies.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_OUTSIDE_LAYERS = ("embedding", "final_norm", "head")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "recommended": {  # docs/results.md
        "policy": "adagrad_select", "granularity": "block", "select_percent": 20.0, "select_every": 1, "score": "sum",
        "on_reentry": "decay",
    },
    "adagrad_select": {
        "policy": "adagrad_select", "granularity": "block", "select_percent": 20.0, "select_every": 1, "score": "sum",
        "on_reentry": "keep",
    },
    "badam": {
        "policy": "cyclic", "granularity": "block", "select_percent": 1.0, "select_every": 50, "on_reentry": "reset",
        "never_select": _OUTSIDE_LAYERS,
    },
    "lisa": {
        "policy": "random", "granularity": "block", "select_percent": 8.0, "select_every": 20, "on_reentry": "keep",
        "always_select": _OUTSIDE_LAYERS,
    },
    "misa": {
        "policy": "misa", "granularity": "module", "select_percent": 3.0, "select_every": 50, "score": "norm",
        "score_decay": 0.8, "temperature": 1.0, "on_reentry": "reset",
    },
    "grass": {
        "policy": "grass", "granularity": "block", "select_percent": 20.0, "select_every": 20, "score": "rms",
        "on_reentry": "keep", "never_select": _OUTSIDE_LAYERS,
    },
}  # fmt: skip
_LISTS = ("always_select", "never_select")


def fill(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given``, the fields that the user has set, with those that its preset adds.

    A block that the user names in one of always_select and never_select is taken out of the preset's other.
    """
    name = given.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return dict(given)
    filled = {**PRESETS[name], **given}
    for ours, theirs in (_LISTS, _LISTS[::-1]):
        named = given.get(theirs)
        if ours in filled and ours not in given and isinstance(named, list | tuple):
            filled[ours] = tuple(block for block in filled[ours] if block not in named)
    return filled


def fills(preset: str | None, field: str, value: Any) -> bool:
    """Return whether ``value`` of ``field`` is what ``preset`` has, or for a list of blocks a part of it."""
    fields = PRESETS.get(preset or "", {})
    if field not in fields:
        return False
    return set(value) <= set(fields[field]) if field in _LISTS else bool(value == fields[field])


def added(given: Mapping[str, Any], problem: str, section: str) -> str:
    """Return a sentence, after a blank, on the fields in ``problem`` that the preset has set; "" if there are none."""
    filled = fill(given)
    fields = [field for field in filled if field not in given and f"{section}.{field}" in problem]
    if not fields:
        return ""
    values = ", ".join(f"{field}={json.dumps(filled[field])}" for field in fields)
    return f' The preset "{given["preset"]}" sets {values}; set it yourself to change it.'


def lines(section: Mapping[str, Any]) -> list[str]:
    """Return what the preset of a checked ``section`` means, a line for each field; empty without a preset."""
    given = {key: value for key, value in section.items() if value is not None and value != "auto"}
    name = given.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return []
    found = [f'preset "{name}" means:']
    filled = fill(given)
    for field, value in PRESETS[name].items():
        yours = "" if field not in given else f" (yours; the preset has {json.dumps(value)})"
        found.append(f'  "{field}": {json.dumps(filled[field])}{yours}')
    return found
