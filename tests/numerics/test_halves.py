"""[Note: Halves]: every fp32 value is its bfloat16 rounding and 16 bits more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_agsel.zero.states.halves import join, rounded, split

# Upper halves: zeros, the least and largest denormals, 1 and its neighbours, the last before an exponent's end, the
# largest finite, and some between.
UPPER = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x40FF, 0x7F7E, 0x7F7F, 0x1234, 0x5A5B]


def every_low_half(upper: int) -> Tensor:
    """The 2**16 fp32 values that begin with ``upper``."""
    bits = torch.arange(2**16, dtype=torch.int64) + (upper << 16)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded values, their bfloat16 and the low halves."""
    master, low = values.clone(), torch.empty(values.numel(), dtype=torch.int16)
    split(master, low)
    return master, master.to(torch.bfloat16), low


@pytest.mark.parametrize("sign", [0, 0x8000])
@pytest.mark.parametrize("upper", UPPER, ids=hex)
def test_parts_make_every_value_again(upper, sign):
    values = every_low_half(upper | sign)
    master, weights, low = parts(values)
    assert torch.equal(weights.float().view(torch.int32), master.view(torch.int32))  # the cast was exact
    out = torch.empty_like(values)
    join(weights, low, out)
    assert torch.equal(out.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("sign", [0, 0x8000])
@pytest.mark.parametrize("upper", UPPER, ids=hex)
def test_rounding_is_to_the_nearest_and_ties_go_away_from_zero(upper, sign):
    values = every_low_half(upper | sign)
    _, weights, _ = parts(values)
    away = every_low_half(upper | sign)[0].view(torch.int32) + 2**16
    away = away.view(torch.float32).to(torch.bfloat16)
    nearest = values.to(torch.bfloat16)  # half to even
    tie = torch.arange(2**16) == 0x8000
    assert torch.equal(weights[~tie], nearest[~tie])
    assert torch.equal(weights[tie], away.view(1))
    assert weights[tie].abs() >= values[tie].abs()


def test_infinities_stay_and_a_nan_stays_a_nan():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4028235e38, -3.4028235e38])
    strange = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, strange])
    _, weights, low = parts(values)
    out = torch.empty_like(values)
    join(weights, low, out)
    assert torch.equal(out.isnan(), values.isnan()) and torch.equal(weights.isnan(), values.isnan())
    finite = ~values.isnan()
    assert torch.equal(out[finite], values[finite])
    assert weights[[0, 3]].tolist() == [float("inf")] * 2 and weights[[1, 4]].tolist() == [-float("inf")] * 2


def test_many_pieces_are_as_one():
    values = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(1))
    _, weights, low = parts(values)
    out = torch.empty_like(values)
    join(weights, low, out)
    assert torch.equal(out, values)
    whole = rounded(values.view(1, -1).expand(2, -1))
    assert torch.equal(whole[1].to(torch.bfloat16), weights) and whole.shape == (2, 2**20 + 7)
    assert torch.equal(rounded(weights), weights.float())
