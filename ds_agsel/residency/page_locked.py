"""Page-locked host memory that is allocated as such: no pageable copy is made, filled and copied first."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("ds_agsel")


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


def empty_if_possible(numel: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Return `empty` memory; pageable, with one warning, if it can't be locked."""
    try:
        return empty(numel, dtype, device)
    except RuntimeError as error:
        room = torch.empty(numel, dtype=dtype)
        _warn_of_pageable(room.nbytes, error)
        return room


def pinned(tensor: Tensor, device: Any) -> Tensor:
    """Return ``tensor`` in page-locked host memory; itself if it is pinned or, with one warning, can't be."""
    if device.is_synchronized_device() or device.is_pinned(tensor):
        return tensor
    try:
        return device.pin_memory(tensor)
    except RuntimeError as error:
        _warn_of_pageable(tensor.nbytes, error)
        return tensor


_pageable_warned = False


def _warn_of_pageable(num_bytes: int, error: RuntimeError) -> None:
    global _pageable_warned
    if not _pageable_warned:
        _pageable_warned = True
        logger.warning(
            "adagrad_select: %d bytes of host memory can't be pinned (%s). Pageable memory is used instead, and "
            "its copies do not overlap with anything. Raise the limit (ulimit -l), or free host memory.",
            num_bytes, error,
        )  # fmt: skip
