"""Describe the processor, for the choices and reports that depend on it."""

from __future__ import annotations

import functools
import platform
from typing import Any

import cpuinfo

# What DeepSpeed's CPU Adam is compiled for, widest first (csrc/includes/simd.h, deepspeed 0.19.8).
_SIMD_LEVELS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sve", "SVE"))
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last is ARM's


@functools.cache
def _cpu_info() -> dict[str, Any]:
    return dict(cpuinfo.get_cpu_info())


def describe() -> dict[str, str]:
    """Return the processor's name, its SIMD level and a remark on it ("" if there is nothing to remark)."""
    info = _cpu_info()
    flags = set(info.get("flags", ()))
    level = next((name for flag, name in _SIMD_LEVELS if flag in flags), "none")
    warning = ""
    if info.get("arch", "").startswith("X86") and level == "none":
        warning = "this processor has no AVX2; CPU Adam runs without vectors, several times slower."
    return {"name": info.get("brand_raw", platform.processor()), "simd": level, "warning": warning}


def has_bf16() -> bool:
    """Return whether the processor has instructions for bf16.

    Without those torch 2.13 takes 4 to 40 times as long over a layer's three bf16 products as in fp32
    (512 × 576 × 1536 on an AVX2 processor: output 6.5, input gradient 40, weight gradient 3.7).
    """
    return not _BF16_FLAGS.isdisjoint(_cpu_info().get("flags", ()))
