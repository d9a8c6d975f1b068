"""Bytes that tensors really take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the storages behind ``tensors``, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
