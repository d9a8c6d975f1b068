"""Page-locked host memory that is allocated as such: no pageable copy is made, filled and copied first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def empty(numel: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Return (numel,) uninitialised numbers in page-locked host memory, for copies to and from ``device``.

    ``device`` is a DeepSpeed accelerator object; for one whose memory is the host's the memory is not locked. Raises
    RuntimeError if it can't be.
    """
    if device.is_synchronized_device():
        return torch.empty(numel, dtype=dtype)
    if hasattr(device, "pin_empty"):  # 0.19.8 has it, 0.19.5 not; it may be told to lock memory by itself
        made: Tensor = device.pin_empty(numel, dtype=dtype)
        return made
    return torch.empty(numel, dtype=dtype, pin_memory=True)


def zeros(numel: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Return `empty` memory, set to 0."""
    return empty(numel, dtype, device).zero_()
