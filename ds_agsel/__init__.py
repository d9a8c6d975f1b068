"""AdaGradSelect (arXiv:2512.15764) for DeepSpeed: full fine-tuning that updates k % of the blocks at each step."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize"]


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` that honours the ds_config's ``adagrad_select`` section; see `ds_agsel.integration`."""
    from ds_agsel import integration  # deepspeed and torch are loaded on first use

    return integration.initialize(*args, **kwargs)
