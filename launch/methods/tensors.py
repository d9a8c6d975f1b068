"""Tensors wherever an optimizer keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def held_by(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors of two elements or more in nested dicts, lists and objects, such as GaLore's projectors.

    Smaller ones are step counts.
    """
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found += [value] if value.numel() > 1 else []
        elif isinstance(value, Mapping):
            found += held_by(value.values())
        elif isinstance(value, (list, tuple)):
            found += held_by(value)
        elif hasattr(value, "__dict__"):
            found += held_by(vars(value).values())
    return found
