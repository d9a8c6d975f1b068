"""AdaGradSelect (arXiv:2512.15764) for DeepSpeed: full fine-tuning that updates k % of the blocks at each step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize", "install", "installed", "uninstall"]

# deepspeed and torch are loaded on first use: `import ds_agsel` is light.


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` that honours the ``adagrad_select`` section; see `ds_agsel.entry.initialize`."""
    from ds_agsel.entry import initialize as entry

    return entry.initialize(*args, **kwargs)


def install() -> None:
    """Make every later call of `deepspeed.initialize` honour the section; see `ds_agsel.entry.install`."""
    from ds_agsel.entry import install as entry

    entry.install()


def uninstall() -> None:
    """Undo `install`; see `ds_agsel.entry.install`."""
    from ds_agsel.entry import install as entry

    entry.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` for a ``with`` block; see `ds_agsel.entry.install`."""
    from ds_agsel.entry import install as entry

    return entry.installed()
