"""Our freezing of parameters, kept apart from the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn


class FreezeMask:
    """Freezes parameters on top of what the user has frozen, and gives the user's choice back.

    [Note: Two masks] ``requires_grad`` holds one value, and both the user and the selection set it. A parameter that
    the user has frozen is left alone. One that the mask freezes is *held*: what the user sets on it meanwhile
    (PEFT's ``disable_adapter()`` freezes and thaws every adapter; a callback freezes a layer) is noted as the user's
    choice. A call of ``requires_grad_`` is caught on the parameter itself, and changes nothing yet; an assignment of
    True is seen at the next `put`. Only an assignment of False to a held parameter can't be seen. The window holds
    parameters from the start of forward to the end of backward, so that user code between them meets its own choice.
    """

    def __init__(self) -> None:
        self._held: dict[int, nn.Parameter] = {}
        self._wanted: dict[int, bool] = {}  # the user's choice for each held parameter

    def put(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze ``parameters``, including held ones that were thawed since."""
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            parameter.requires_grad = False
            key = id(parameter)
            self._wanted[key] = True
            if key not in self._held:
                self._held[key] = parameter
                parameter.requires_grad_ = partial(self._note, parameter)  # type: ignore[method-assign]

    def _note(self, parameter: nn.Parameter, requires_grad: bool = True) -> nn.Parameter:
        """Note the user's choice, in place of ``parameter.requires_grad_``."""
        self._wanted[id(parameter)] = requires_grad
        return parameter

    def lift(self) -> None:
        """Restore the user's ``requires_grad`` of every held parameter. Idempotent."""
        for key, parameter in self._held.items():
            del parameter.requires_grad_
            parameter.requires_grad = parameter.requires_grad or self._wanted[key]
        self._held.clear()
        self._wanted.clear()
