"""Gathers of several ZeRO-3 parameters are complete over gloo, also with a DeepSpeed that waits for the last alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ds_agsel.zero import compat
from ds_agsel.zero.compat import weights


class Weight:
    """A parameter of ZeRO-3 until 0.19.7: of those that are gathered together, only the last one has come."""

    ds_process_group = None

    def __init__(self) -> None:
        self.has_come = False

    def all_gather(self, param_list: Sequence[Any] | None = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        asked = [self] if param_list is None else param_list
        if async_op:
            return [f"handle of {len(asked)}"]
        asked[-1].has_come = True
        return None


@pytest.mark.parametrize(
    ("older", "backend", "complete"), [(True, "gloo", True), (True, "nccl", False), (False, "gloo", False)]
)
def test_what_is_gathered_together_has_come(
    monkeypatch: pytest.MonkeyPatch, older: bool, backend: str, complete: bool
) -> None:
    """NCCL finishes in order, and 0.19.8 waits for each: there DeepSpeed's own gather stays."""
    monkeypatch.setattr(weights, "until", lambda newest: newest == "0.19.7" and older)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group=None: backend)
    some = [Weight() for _ in range(3)]
    compat.complete_gathers(some)
    assert some[1].all_gather(some, async_op=True) == ["handle of 3"]
    some[0].all_gather(some)
    assert [weight.has_come for weight in some] == [complete, complete, True]
    some[1].all_gather()
    assert some[1].has_come
