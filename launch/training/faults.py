"""Check that a method trains what it should: compare some elements of every parameter around its work."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

_ELEMENTS = 512  # looked at of each parameter
_EXPECTED_CHANGES = 20  # of these elements; where so many are expected, none changes once in e**20 steps


class FaultWatch:
    """Looks at a model as its engine is made, and before and after each step. Of this rank's weights.

    Made with the model as it was loaded; then comes `engine_made`, and around each step the other two.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._before = {name: _sample(parameter) for name, parameter in self._parameters.items()}
        self._remade: dict[str, float] = {}  # parameter -> mean |Δw| by the making of the engine
        self._steps = 0
        self._idle: list[int] = []
        self._nonfinite: list[int] = []
        self._moved: dict[int, tuple[float, str]] = {}  # step -> largest mean |Δw| of a frozen parameter, its name

    def engine_made(self, model: nn.Module) -> None:
        """``model`` is the engine's. ZeRO-3's parts are left out: ZenFlow keeps them transposed."""
        self._parameters = dict(model.named_parameters())
        for name in self._before.keys() & self._parameters.keys():
            if not hasattr(self._parameters[name], "ds_tensor"):
                after = _sample(self._parameters[name])
                drift = (after.float() - self._before[name].to(after).float()).abs().mean()
                if drift > 0:
                    self._remade[name] = float(drift)

    def before_step(self) -> None:
        """Sample the parameters before a step."""
        self._before = {name: _sample(parameter) for name, parameter in self._parameters.items()}

    def after_step(self, record: dict[str, Any], trained: Collection[str] | None) -> None:
        """Compare the parameters with `before_step`'s.

        ``record`` is the step's in metrics.jsonl; ``trained`` names the parameters that it should change, None: those
        that require gradients. A step that was skipped, or whose lr is 0 or so small that rounding hides it, as at the
        end of a schedule in bf16, need not change anything.
        """
        step = record["step"]
        self._steps += 1
        if not math.isfinite(record["loss"]):
            self._nonfinite.append(step)
            return
        if trained is None:
            trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        drift, changed = {}, False
        for name, parameter in self._parameters.items():
            before, after = self._before[name], _sample(parameter)
            if before.shape != after.shape or torch.equal(before, after):
                continue
            changed = True
            if name not in trained:
                drift[name] = float((after.float() - before.float()).abs().mean())
        if drift:
            name = max(drift, key=drift.__getitem__)
            self._moved[step] = (drift[name], name)
        if not changed and record["phase"] != "skipped" and self._expected(record["lr"], trained) >= _EXPECTED_CHANGES:
            self._idle.append(step)

    def _expected(self, lr: float, trained: Collection[str]) -> float:
        """Return how many of the elements looked at change in a step of about ``lr`` each, as Adam's is."""
        expected = 0.0
        for name in self._before.keys() & trained:
            before = self._before[name]
            spacing = before.abs().double() * torch.finfo(before.dtype).eps
            expected += float((lr / spacing).clamp(max=1.0).nan_to_num(0.0).sum())
        return expected

    def sentences(self) -> list[str]:
        """Return the faults found, a sentence each."""
        found = []
        if self._remade:
            name = max(self._remade, key=self._remade.__getitem__)
            found.append(
                f"{len(self._remade)} of {len(self._parameters)} parameters changed as the engine was made: "
                f"mean |Δw| up to {self._remade[name]:.1e} ({name})."
            )
        if self._nonfinite:
            found.append(f"The loss was not finite in {self._of(self._nonfinite)}.")
        if self._moved:
            step, (drift, name) = max(self._moved.items(), key=lambda item: item[1])
            found.append(
                f"Frozen parameters moved in {self._of(list(self._moved))}: mean |Δw| up to {drift:.1e} "
                f"({name}, step {step})."
            )
        if self._idle:
            found.append(f"No weight changed in {self._of(self._idle)}.")
        return found

    def _of(self, steps: list[int]) -> str:
        listed = ", ".join(map(str, steps[:10])) + (", …" if len(steps) > 10 else "")
        return f"{len(steps)} of {self._steps} steps ({listed})"


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    """Return a copy of every n-th element; under ZeRO-3, of this rank's part of the parameter."""
    weights = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)
    return weights[:: max(1, weights.numel() // _ELEMENTS)].clone()
