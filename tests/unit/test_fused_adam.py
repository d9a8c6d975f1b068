"""`compat.has_fused_adam`: only an op that loads counts."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import pytest
from torch import nn

import ds_agsel
from ds_agsel.zero import compat
from ds_agsel.zero.compat import adam


class Builder:
    """A builder that calls itself compatible, as DeepSpeed's CUDA builders do without nvcc."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def load(self, verbose: bool = True) -> object:
        assert not verbose
        if self._error is not None:
            raise self._error
        return object()


class NotImplementedBuilder(Builder):
    """DeepSpeed's stand-in (op_builder/cpu/no_impl.py) for an op that an accelerator does not have."""


class Accelerator:
    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def create_op_builder(self, name: str) -> Any:
        assert name == "FusedAdamBuilder"
        return self._builder


@pytest.mark.parametrize(
    ("builder", "expected"),
    [
        (Builder(None), True),
        (None, False),
        (NotImplementedBuilder(None), False),
        (Builder(OSError("CUDA_HOME environment variable is not set")), False),  # torch, without nvcc
        (Builder(RuntimeError("Unable to JIT load the fused_adam op due to ninja not being installed.")), False),
        (Builder(ImportError("undefined symbol")), False),
    ],
)
def test_only_an_op_that_loads_counts(
    builder: Any, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adam, "get_accelerator", lambda: Accelerator(builder))
    with caplog.at_level("WARNING", logger="ds_agsel"):
        assert compat.has_fused_adam() is expected
    reason = getattr(builder, "_error", None)
    if reason is not None:
        assert f"can't be built here ({type(reason).__name__}: {reason})" in caplog.text
        assert "torch's AdamW is used instead" in caplog.text
    else:
        assert not caplog.records


@pytest.mark.parametrize("listed, read", [("9.0a", "9.0"), ("8.6;10.0f+PTX", "8.6;10.0+PTX"), ("8.0 9.0", "8.0 9.0")])
def test_an_architecture_with_a_letter_is_read(listed: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Reader(Builder):
        def load(self, verbose: bool = True) -> object:
            found.append(os.environ["TORCH_CUDA_ARCH_LIST"])
            return object()

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(adam, "get_accelerator", lambda: Accelerator(Reader(None)))
    assert compat.has_fused_adam()
    assert found == [read] and os.environ["TORCH_CUDA_ARCH_LIST"] == listed


def test_deepspeed_makes_its_engine_with_the_architectures_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a plain engine, of which DeepSpeed builds the ops."""
    found = []

    def make(*args: Any, **kwargs: Any) -> tuple[None, ...]:
        found.append(os.environ["TORCH_CUDA_ARCH_LIST"])
        return None, None, None, None

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(deepspeed, "initialize", make)
    ds_agsel.initialize(model=nn.Linear(1, 1), config={"train_batch_size": 1})
    assert found == ["9.0"] and os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a"
