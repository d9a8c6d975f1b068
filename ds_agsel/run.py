"""``python -m ds_agsel.run script.py ...``: `ds_agsel.install`, then the script; see `ds_agsel.entry.run`."""

from __future__ import annotations

import sys

from ds_agsel.entry.run import main

__all__ = ["main"]

if __name__ == "__main__":
    main(sys.argv[1:])
