"""The engine: its class, its checkpoint files, its compilation, its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_agsel.errors import ConfigError
from ds_agsel.zero.compat.views import attribute


def swap_class(instance: Any, subclass: type) -> None:
    """Make ``instance`` an object of ``subclass``, which must add methods and no constructor.

    This leaves DeepSpeed's long constructors to DeepSpeed (docs/deepspeed.md).
    """
    if type(instance) not in subclass.__mro__:
        base = next(cls for cls in subclass.__mro__ if cls.__module__.startswith("deepspeed."))
        raise ConfigError(
            f"deepspeed=={deepspeed.__version__} made a {type(instance).__name__} where adagrad_select needs a "
            f"{base.__name__}. Use ZeRO stage 1, 2 or 3 with the plain DeepSpeed engine."
        )
    instance.__class__ = subclass


@contextmanager
def writes_through(engine: DeepSpeedEngine, attempt: Callable[..., Any]) -> Iterator[list[Path]]:
    """Make ``engine.save_checkpoint`` write each file as ``attempt(write, *args)`` inside this context.

    These are its checkpoint engine's ``save`` and the copies of its recovery scripts, which only rank 0 makes
    (engine.py:5530), beside the tag. Yields the tag's files that this rank wrote, filled as they are written.
    """
    writer = engine.checkpoint_engine
    written: list[Path] = []

    def save(state_dict: Any, path: str) -> None:
        attempt(writer_save, state_dict, path)
        written.append(Path(path))

    writer_save = writer.save
    with (
        attribute(writer, save=save),
        attribute(engine, _copy_recovery_script=partial(attempt, engine._copy_recovery_script)),
    ):
        yield written


@contextmanager
def fp32_weights_of(tag: str) -> Iterator[None]:
    """Inside, ZeRO-3's load of the weights alone reads ``tag``: stock reads the one in ``latest`` (engine.py:4614)."""
    read = partial(engine_module.get_fp32_state_dict_from_zero_checkpoint, tag=tag)
    with attribute(engine_module, get_fp32_state_dict_from_zero_checkpoint=read):
        yield


@contextmanager
def loads_through(engine: DeepSpeedEngine, load: Callable[[str], Any]) -> Iterator[None]:
    """Inside, ``engine`` reads checkpoint files by ``load(path)``."""
    with attribute(engine.checkpoint_engine, load=lambda path, map_location=None: load(path)):
        yield


def whole_state_dict(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """Return the model's state dict on rank 0, None elsewhere. Collective.

    ZeRO-3's is gathered to the host layer by layer.
    """
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict() if engine.global_rank == 0 else None


def mark_compiled(engine: DeepSpeedEngine, compile_kwargs: Mapping[str, Any]) -> None:
    """Set what `DeepSpeedEngine.compile` sets once the module is compiled (engine.py:5871, 5941)."""
    deepspeed.utils.nvtx.enable_nvtx = False
    engine._is_compiled = True
    engine._compile_mode = "model"
    engine._compile_kwargs = compile_kwargs
