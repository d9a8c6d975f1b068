"""Page-locked memory that torch keeps is given back on CUDA, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_agsel.zero import compat
from ds_agsel.zero.compat import memory


@pytest.mark.parametrize(("device", "times"), [("cuda", 1), ("cpu", 0)])
def test_torch_is_asked_to_give_it_back_on_cuda(monkeypatch: pytest.MonkeyPatch, device: str, times: int) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: asked.append(device), raising=False)
    monkeypatch.setattr(memory, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    compat.give_back_page_locked()
    assert len(asked) == times


def test_a_torch_without_cuda_has_nothing_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    monkeypatch.setattr(memory, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    compat.give_back_page_locked()
