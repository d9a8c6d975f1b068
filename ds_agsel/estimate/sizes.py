"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from ds_agsel.errors import ConfigError

GIB = 2**30
_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9,
          "TB": 10**12, "M": 2**20, "G": GIB, "T": 2**40}  # fmt: skip


def read_bytes(text: str, option: str) -> int:
    """Return the bytes that ``text`` says: "32GiB", "32 GB" (10^9 bytes each), "32G" (GiB).

    Raises ConfigError, naming ``option``, if it says no amount above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    amount = round(float(found[1]) * unit) if found and unit else 0
    if amount <= 0:
        raise ConfigError(f"{option}={text} is not an amount of memory. Write it with its unit: 32GiB.")
    return amount
