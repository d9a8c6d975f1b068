"""The tensors in which a group's state rests, by `state_dtype` and `master_weights`: (elements, dtype) of each."""

from __future__ import annotations

import torch

from ds_agsel.residency.arena import Room
from ds_agsel.residency.states import MOMENTS

BLOCK_NUMEL = 256  # elements that share a largest value, with "int8"
_MASTER_DTYPES = {"fp32": torch.float32, "split": torch.int16}
_MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def master_room(master_weights: str, numel: int) -> Room:
    """Return the room of ``numel`` master weights; with "split" of what rests of them beside the model weights."""
    return numel, _MASTER_DTYPES[master_weights]


def moment_rooms(state_dtype: str, numel: int) -> dict[str, Room]:
    """Return the rooms, by name, of the tensors that both moments of ``numel`` elements take."""
    if state_dtype != "int8":
        return dict.fromkeys(MOMENTS, (numel, _MOMENT_DTYPES[state_dtype]))
    blocks = -(-numel // BLOCK_NUMEL)
    of_one = ((codes_name, (numel, torch.uint8)), (largest_name, (blocks, torch.float32)))
    return {name(key): room for key in MOMENTS for name, room in of_one}


def codes_name(key: str) -> str:
    """Return the name of the 8-bit codes of moment ``key``."""
    return f"{key}_int8"


def largest_name(key: str) -> str:
    """Return the name of the largest value of each block of moment ``key``."""
    return f"{key}_largest"
