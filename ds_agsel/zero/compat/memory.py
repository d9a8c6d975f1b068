"""Page-locked host memory, as the accelerators of each release give it back."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.zero.compat.versions import until


def give_back_page_locked() -> None:
    """Give page-locked memory back that nothing uses any more; torch's allocator keeps it for later requests."""
    empty_cache = getattr(torch._C, "_host_emptyCache", None)  # which torch without CUDA lacks
    if empty_cache is not None and get_accelerator().device_name() == "cuda":
        empty_cache()


def unpin_memory(tensor: torch.Tensor) -> None:
    """Free ``tensor``'s page-locked memory if it is of DeepSpeed's own allocator, which came with 0.19.6.

    Torch's, the only one until 0.19.5, frees it with the last reference.
    """
    if not until("0.19.5"):
        get_accelerator().unpin_memory(tensor)
