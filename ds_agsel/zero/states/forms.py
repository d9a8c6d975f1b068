"""The forms that Adam's moments can rest in, between the updates of their group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_agsel.residency.states import MOMENTS


class MomentForm(ABC):
    """How a moment, fp32, (numel,), is kept in fewer bytes. A moment's form is one or more tensors by name."""

    name: ClassVar[str]

    @abstractmethod
    def pack(self, key: str, values: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return moment ``key`` of ``values`` in this form: new tensors on the same device.

        With ``generator`` rounding is stochastic where the form rounds so; without, to the nearest. What `unpack` gave
        packs to the same bits.
        """

    @abstractmethod
    def unpack(self, key: str, packed: dict[str, Tensor], out: Tensor) -> None:
        """Write moment ``key`` of ``packed`` to ``out``, fp32, (numel,)."""

    @abstractmethod
    def found(self, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors of both moments in a loaded Adam state; None if they are not in this form."""


class Bf16Moments(MomentForm):
    """bfloat16 with stochastic rounding: 2 bytes an element.

    With β2 = 0.999 an update moves ``exp_avg_sq`` by less than half a unit in bfloat16's last place: rounded to the
    nearest it would stand still. Rounded up or down at random, in proportion, it is right on average.
    """

    name = "bf16"

    def pack(self, key: str, values: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {key: values.to(torch.bfloat16) if generator is None else rounded_stochastically(values, generator)}

    def unpack(self, key: str, packed: dict[str, Tensor], out: Tensor) -> None:
        out.copy_(packed[key])

    def found(self, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
        if any(state[key].dtype != torch.bfloat16 for key in MOMENTS):
            return None
        return {key: state[key] for key in MOMENTS}


FORMS: dict[str, type[MomentForm]] = {form.name: form for form in (Bf16Moments,)}


def rounded_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``values``, fp32, as bfloat16: one of the two neighbours, the nearer the likelier; exact values stay.

    The bits that bfloat16 lacks carry, with 16 random bits added, into those that it has. Values that are not finite
    are rounded as ``to`` rounds them.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    noise.random_(0, 1 << 16, generator=generator)
    bits = noise.add_(values.detach().contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values.detach()).to(torch.bfloat16)
