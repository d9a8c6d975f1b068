"""bfloat16 moments: rounded up or down at random, in proportion, by seeds that a resumed run has too."""

from __future__ import annotations

import math

import pytest
import torch

from ds_agsel.zero.states.forms import FORMS, Bf16Moments, rounded_stochastically


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fraction", [0.03, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_nearer_neighbour_is_the_likelier_in_proportion(fraction: float, sign: float) -> None:
    """|z| < 5 of 100,000 draws: a right generator fails once in a million times."""
    draws, low, high = 100_000, sign * 1.0, sign * (1.0 + 2**-7)  # neighbours in bfloat16
    rounded = rounded_stochastically(torch.full((draws,), low + fraction * (high - low)), generator()).float()
    assert set(rounded.tolist()) == {low, high}
    share = (rounded == high).float().mean().item()
    assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / draws) + 2**-16


def test_a_small_growth_is_kept_on_average_where_the_nearest_would_stand_still() -> None:
    values = torch.ones(20_000)
    for step in range(100):
        values = rounded_stochastically(values * (1 + 2**-12), generator(step)).float()
    assert values.mean().item() == pytest.approx((1 + 2**-12) ** 100, rel=1e-3)
    assert (torch.ones(1) * (1 + 2**-12)).to(torch.bfloat16) == 1


def test_exact_values_stay_and_what_is_not_finite_passes() -> None:
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(rounded_stochastically(exact.float(), generator()), exact)
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40])
    rounded = rounded_stochastically(odd, generator())
    assert rounded[:4].tolist() == [0.0, -0.0, math.inf, -math.inf] and rounded[4].isnan()
    assert math.copysign(1, rounded[1]) == -1


def test_the_same_seed_gives_the_same_bits() -> None:
    values = torch.randn(1000)
    first, second, other = (rounded_stochastically(values, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("form", FORMS.values())
def test_what_was_unpacked_packs_to_the_same_bits(form: type) -> None:
    made = form()
    values = torch.randn(700).square() * 1e-6
    for key in ("exp_avg", "exp_avg_sq"):
        packed = made.pack(key, values, generator())
        out = torch.empty(700)
        made.unpack(key, packed, out)
        again = made.pack(key, out, generator(9))
        assert packed.keys() == again.keys()
        assert all(torch.equal(packed[name], again[name]) for name in packed)
        assert (out - values).abs().max() <= 2**-7 * values.abs().max()


def test_moments_are_found_in_a_loaded_state_by_their_dtype() -> None:
    half = torch.zeros(3, dtype=torch.bfloat16)
    assert Bf16Moments().found({"step": 1, "exp_avg": half, "exp_avg_sq": half}) == {
        "exp_avg": half,
        "exp_avg_sq": half,
    }
    assert Bf16Moments().found({"step": 1, "exp_avg": half.float(), "exp_avg_sq": half.float()}) is None
