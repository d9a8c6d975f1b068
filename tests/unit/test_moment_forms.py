"""bfloat16 moments: rounded up or down at random, in proportion, by seeds that a resumed run has too."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping

import pytest
import torch

from ds_agsel.errors import CheckpointError, ConfigError
from ds_agsel.zero.states import forms
from ds_agsel.zero.states.forms import (
    Bf16Moments,
    Int8Moments,
    MomentForm,
    form_of,
    in_fp32,
    new_form,
    rounded_stochastically,
)


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


NEEDS_LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (ds-agsel[lowbit])"
)
KEYS = ("exp_avg", "exp_avg_sq")


def unpacked(form: MomentForm, key: str, packed: Mapping[str, torch.Tensor], numel: int) -> torch.Tensor:
    out = torch.full((numel,), 7.0)
    form.unpack(key, packed, out)
    return out


@pytest.mark.parametrize("form", [Bf16Moments, pytest.param(Int8Moments, marks=NEEDS_LIBRARY)])
def test_a_moment_takes_the_room_that_the_form_says_and_is_near(form: type[MomentForm]) -> None:
    made = form()
    for numel in (0, 1, 255, 256, 257, 1000):
        rooms = made.rooms(numel)
        for key in KEYS:
            values = torch.randn(numel) * 1e-6 if key == "exp_avg" else torch.randn(numel).square() * 1e-12
            packed = made.pack(key, values, generator())
            assert {name: (tensor.numel(), tensor.dtype) for name, tensor in packed.items()} == {
                name: room for name, room in rooms.items() if name in packed
            }
            again = unpacked(made, key, packed, numel)
            assert (again - values).norm() <= 0.02 * values.norm()


def test_bf16_moments_pack_to_the_same_bits_again() -> None:
    values = torch.randn(700).square() * 1e-6
    packed = Bf16Moments().pack("exp_avg_sq", values, generator())
    again = Bf16Moments().pack("exp_avg_sq", unpacked(Bf16Moments(), "exp_avg_sq", packed, 700), generator(9))
    assert torch.equal(packed["exp_avg_sq"], again["exp_avg_sq"])


@NEEDS_LIBRARY
@pytest.mark.parametrize("piece_numel", [2**22, 512])
def test_eight_bits_change_only_in_blocks_whose_values_were_changed(
    monkeypatch: pytest.MonkeyPatch, piece_numel: int
) -> None:
    """The library's own codes of what it dequantized differ: no code is -1."""
    monkeypatch.setattr(forms, "_PIECE_NUMEL", piece_numel)
    form, values = Int8Moments(), -torch.rand(1100)
    before = form.pack("exp_avg", values)
    seen = unpacked(form, "exp_avg", before, 1100)
    anew = form.pack("exp_avg", seen)
    assert not torch.equal(anew["exp_avg_largest"], before["exp_avg_largest"])
    same = form.pack_again("exp_avg", seen, before)
    assert all(torch.equal(same[name], before[name]) for name in before)
    for changed in (300, 1099):
        value = seen.clone()
        value[changed] = 0.5
        after = unpacked(form, "exp_avg", form.pack_again("exp_avg", value, before), 1100)
        block = slice(changed // 256 * 256, changed // 256 * 256 + 256)
        assert after[changed] == pytest.approx(0.5, rel=0.02)
        after[block] = seen[block]
        assert torch.equal(after, seen)


@NEEDS_LIBRARY
def test_zeros_stay_zeros_in_eight_bits() -> None:
    """On a processor the library itself makes 2.1e-5 of the block's largest value of them."""
    form = Int8Moments()
    for key in KEYS:
        values = torch.rand(600)
        values[::2] = 0
        assert not unpacked(form, key, form.pack(key, values), 600)[::2].any()
        assert not unpacked(form, key, form.pack(key, torch.zeros(600)), 600).any()


def test_moments_are_found_in_a_loaded_state_by_name_and_dtype() -> None:
    half = torch.zeros(3, dtype=torch.bfloat16)
    assert Bf16Moments.found({"step": 1, "exp_avg": half, "exp_avg_sq": half}) == {"exp_avg": half, "exp_avg_sq": half}
    whole = {"step": 1, "exp_avg": half.float(), "exp_avg_sq": half.float()}
    assert Bf16Moments.found(whole) is None
    assert form_of(whole) is None and in_fp32(whole) == whole
    assert form_of({"step": 1, **_eight_bits()}) is Int8Moments


def _eight_bits() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(numel, dtype=dtype) for name, (numel, dtype) in Int8Moments.rooms(3).items()}


def test_a_form_whose_library_is_missing_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(CheckpointError, match=r"moments are int8, and bitsandbytes.*pip install 'ds-agsel\[lowbit\]'"):
        in_fp32(_eight_bits())
    with pytest.raises(ConfigError, match=r"state_dtype='int8' needs bitsandbytes.*\[lowbit\]'.*bf16.*needs nothing"):
        new_form("int8")
