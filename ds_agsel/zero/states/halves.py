"""An fp32 value as a bfloat16 model weight and the 16 bits that it lacks.

[Note: Halves] A bfloat16 has the sign, the exponent and the upper 7 bits of the mantissa of an fp32 value. With w the
32 bits of the value, w + 2**15 without its lower 16 bits is the nearest bfloat16, exact ties away from zero; the low
half is the lower 16 bits of w as they are. Read as a signed number it is what the model weight is too small by, in
units of the last place of fp32, so that (model weight << 16) + low half is w again for every w. Half to even, as torch
and DeepSpeed round, could not be undone: of a tie it doesn't tell to which side it went.

A NaN is made the one NaN of torch's conversions, whose rounding is a NaN too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE_NUMEL = 2**20  # so that what is made on the way is small


def split(master: Tensor, low: Tensor) -> None:
    """Write the low halves of ``master``, fp32, (numel,), to ``low``, int16, (numel,), and round ``master`` in place.

    What is left in ``master`` are values that bfloat16 has: a cast to it is exact, however it rounds.
    """
    for values, halves in _pieces(master, low):
        values.masked_fill_(values.isnan(), math.nan)
        bits = values.view(torch.int32)
        halves.copy_(_lower_bits(bits))
        bits.add_(0x8000).bitwise_and_(-0x10000)


def join(weights: Tensor, low: Tensor, out: Tensor) -> None:
    """Write the fp32 values of ``weights``, bfloat16, and ``low``, int16, to ``out``, fp32; all of (numel,)."""
    for (values, halves), upper in zip(_pieces(out, low), weights.split(_PIECE_NUMEL), strict=True):
        bits = values.view(torch.int32)
        bits.copy_(upper.view(torch.int16))
        bits.mul_(0x10000).add_(halves)


def rounded(values: Tensor) -> Tensor:
    """Return ``values`` in fp32, a new tensor, rounded to bfloat16's values as `split` rounds them."""
    copy = torch.empty(values.shape, dtype=torch.float32, device=values.device).copy_(values.detach())
    split(copy.view(-1), torch.empty(copy.numel(), dtype=torch.int16, device=copy.device))
    return copy


def _pieces(master: Tensor, low: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(master.split(_PIECE_NUMEL), low.split(_PIECE_NUMEL), strict=True)


def _lower_bits(bits: Tensor) -> Tensor:
    """Return the lower 16 bits of ``bits``, int32, as a signed number, int32."""
    return bits.add(0x8000).bitwise_and_(0xFFFF).sub_(0x8000)
