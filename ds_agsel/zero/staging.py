"""Where ZeRO-Offload casts updated master weights to the model's dtype on their way to the accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.residency import page_locked
from ds_agsel.zero import compat


class HostStaging:
    """One host buffer, as large as the largest step so far needs, divided anew for each step's groups.

    Stock ZeRO-Offload keeps one for every group for good (stage_1_and_2.py:564), 2 bytes for each element of the model.
    The copies out of it are over before the next step writes to it: the step waits for its gradients' norm.
    """

    def __init__(self, numels: Sequence[int], dtype: torch.dtype, pin_memory: bool) -> None:
        self._numels = list(numels)
        self._pin_memory = pin_memory
        self._buffer = torch.empty(0, dtype=dtype)

    def slices(self, groups: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return a host buffer for each of ``groups``, (numel,), in the model's dtype; valid until the next call."""
        needed = sum(self._numels[group] for group in groups)
        if self._buffer.numel() < needed:
            self.release()
            dtype = self._buffer.dtype
            self._buffer = (
                page_locked.empty(needed, dtype, get_accelerator())
                if self._pin_memory
                else torch.empty(needed, dtype=dtype)
            )
        cut = self._buffer[:needed].split([self._numels[group] for group in groups]) if groups else ()
        return dict(zip(groups, cut, strict=True))

    def release(self) -> None:
        """Free the memory."""
        if self._pin_memory and self._buffer.numel():
            compat.unpin_memory(self._buffer)
        self._buffer = self._buffer.new_empty(0)

    def held_bytes(self) -> int:
        """Return the bytes held now, on this rank."""
        return self._buffer.nbytes
