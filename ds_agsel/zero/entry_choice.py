"""Choose the trained entries of a matrix of `sparse_grad`: on rank 0, by what all ranks have gathered, for all."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_agsel.sparse.basis import Energy, Support, choose, draw
from ds_agsel.sparse.targets import Target
from ds_agsel.sparse_grad_section import SparseGradConfig


def choose_for_all(target: Target, energy: Energy, section: SparseGradConfig, draw_key: Hashable) -> Support:
    """Return the entries of ``target``, the same on all ranks, on this rank's device. Collective.

    Args:
        energy: of this rank's gradients; it becomes the sum of all ranks'.
        draw_key: what a random choice depends on.
    """
    ranks = dist.get_world_size()
    if ranks > 1:
        for tensor in energy.tensors():
            dist.all_reduce(tensor)
    support = None
    if dist.get_rank() == 0:
        if section.choice == "random":
            support = draw(energy, target.entries, zlib.crc32(repr(draw_key).encode()))
        else:
            support = choose(energy, target.entries, target.weight.dtype)
    if ranks > 1:
        support = _of_rank_0(support, target, section)
    if support is None:
        raise RuntimeError("rank 0 gave no entries")
    return support.to(_device())


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _of_rank_0(support: Support | None, target: Target, section: SparseGradConfig) -> Support:
    """Return rank 0's support on every rank. Collective."""
    device, dtype = _device(), target.weight.dtype

    def share(tensor: Tensor | None, shape: Sequence[int], of: torch.dtype) -> Tensor:
        sent = torch.empty(tuple(shape), dtype=of, device=device) if tensor is None else tensor.to(device)
        dist.broadcast(sent, src=0)
        return sent.cpu()

    def given(name: str) -> Any:
        return None if support is None else getattr(support, name)

    lines, directions = target.num_lines, target.num_directions
    captured = None
    if support is not None:
        captured = torch.tensor([support.captured, support.captured_plain], dtype=torch.float64)
    captured = share(captured, (2,), torch.float64)
    lengths = share(given("lengths"), (lines,), torch.int64)
    scattered = None
    if section.choice == "random":
        scattered = share(given("scattered"), (target.entries,), torch.int64)
    widest = int(share(None if support is None else torch.tensor(support.widest), (), torch.int64))
    shape, of = ((widest,), torch.int64) if section.rotation == "none" else ((directions, widest), dtype)
    return Support(
        lengths=lengths,
        directions=share(given("directions"), shape, of),
        num_directions=directions,
        lines=share(given("lines"), (lines, lines), dtype) if section.rotation == "both" else None,
        captured=float(captured[0]),
        captured_plain=float(captured[1]),
        scattered=scattered,
    )
