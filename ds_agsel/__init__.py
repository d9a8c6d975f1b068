"""AdaGradSelect (arXiv:2512.15764) for DeepSpeed: full fine-tuning that updates k % of the blocks at each step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize", "install", "installed", "uninstall"]

# deepspeed and torch are loaded on first use: `import ds_agsel` is light.


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` that honours the ds_config's ``adagrad_select`` section; see `ds_agsel.integration`."""
    from ds_agsel import integration

    return integration.initialize(*args, **kwargs)


def install() -> None:
    """Make every later call of `deepspeed.initialize` honour the section; see `ds_agsel.installation`."""
    from ds_agsel import installation

    installation.install()


def uninstall() -> None:
    """Undo `install`; see `ds_agsel.installation`."""
    from ds_agsel import installation

    installation.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` inside a ``with``; see `ds_agsel.installation`."""
    from ds_agsel import installation

    return installation.installed()
