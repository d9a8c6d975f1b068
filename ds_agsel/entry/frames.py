"""The only module that walks the call stack: for what a framework knows but does not pass on to what it calls.

It is read in two cases, in each because upstream has no hook for it:

- `callers`: Accelerate calls `deepspeed.initialize` with model and optimizer and keeps the data loader
  (accelerator.py:2144, 1.15); HF Trainer, which knows the steps of an epoch, calls Accelerate. An argument
  ``training_data`` or ``steps_per_epoch`` from there would replace this.
- `hf`: a TrainerCallback is not told of the CallbackHandler that calls it (trainer_callback.py, transformers 5), and
  the order of its list decides which callbacks see an edited log. A priority of callbacks would replace this.

Only objects of public classes are looked for, and the local variables of documented functions; where a framework
changes, nothing is found and the caller goes on without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


def callers() -> Iterator[FrameType]:
    """Yield the frames of the caller and of its callers, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def methods_of(module: str, name: str) -> Iterator[tuple[Any, FrameType]]:
    """Yield the instance and the frame of each running method of class ``module.name``, innermost first.

    The class is not imported: if no module has imported it, no frame can belong to it.
    """
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type):
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, cls):
            yield owner, frame
        frame = frame.f_back
