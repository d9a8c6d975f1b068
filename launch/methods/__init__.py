"""How a job trains: as its ds_config says, or by one of the methods that AdaGradSelect is compared with. Light."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_agsel.errors import ConfigError

if TYPE_CHECKING:
    from .base import Method

__all__ = ["NAMES", "make"]

# The module of each method; imported on demand, since most need a package of the extra `peers`.
_CLASSES = {
    "adagrad_select": "zero:AdaGradSelect",
    "gast": "zero:Gast",
    "full": "zero:Full",
    "offload": "zero:Offload",
    "lora": "lora:Lora",
    "badam": "badam:Badam",
    "badam_zero1": "badam:BadamZero1",
    "badam_zero2": "badam:BadamZero2",
    "badam_zero3": "badam:BadamZero3",
    "lisa": "lisa:Lisa",
    "lisa_zero": "lisa:LisaZero",
    "galore": "galore:Galore",
    "apollo": "apollo:Apollo",
    "sparse_grad": "sparse_grad:SparseGrad",
    "zenflow": "zenflow:ZenFlow",
}
NAMES = tuple(_CLASSES)


def make(name: str, words: Sequence[str] = ()) -> Method:
    """Return the method ``name`` with its options, each a word ``key=value``. Raise ConfigError for unknown ones."""
    module, _, class_name = _CLASSES[name].partition(":")
    kind: type[Method] = getattr(importlib.import_module(f".{module}", __package__), class_name)
    values = dict(kind.OPTIONS)
    for word in words:
        key, _, text = word.partition("=")
        if key not in values:
            allowed = ", ".join(f"{known}={value}" for known, value in kind.OPTIONS.items()) or "none"
            raise ConfigError(f"--method-option={word!r} is unknown to {name}. It has (with defaults): {allowed}.")
        wanted = type(kind.OPTIONS[key])
        try:
            values[key] = wanted(text)
        except ValueError:
            raise ConfigError(f"--method-option={word!r} is no {wanted.__name__}. Give one.") from None
    return kind(name, values)
