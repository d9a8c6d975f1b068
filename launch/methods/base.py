"""The interface between a job and a method, and the code that all methods share."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch

from ds_agsel.config import SECTION
from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError
from ds_agsel.zero import compat

Option = int | float | str


@dataclass(frozen=True)
class RunContext:
    """The run that a method is started in. ``config`` is a complete ds_config (`run_config.complete`).

    ``support``: arguments of `ds_agsel.initialize` that give it support data; empty where nothing asks for it.
    """

    config: dict[str, Any]
    steps_per_epoch: int
    seed: int
    support: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """One way to train. A job calls `edit`, then `start`, then at each step `begin_step` and, after it, the queries.

    Sizes are those of this process. A subclass must define only `start`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}  # name -> default; an option has its default's type
    RESUMES: ClassVar[bool] = True  # whether its engine saves and loads checkpoints, and compiles

    def __init__(self, name: str, options: Mapping[str, Option]) -> None:
        self.name = name
        self.options: Mapping[str, Any] = options
        self.engine: Any = None

    def check(self, wanted: argparse.Namespace) -> None:
        """Raise ConfigError if the job's options request something this method does not support."""
        for option in ("resume", "checkpoint_every", "compile"):
            if getattr(wanted, option) and not self.RESUMES:
                flag = option.replace("_", "-")
                raise ConfigError(f"--{flag} is not there for --method {self.name}, which is no engine. Leave it out.")

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the ds_config to run with, made from the user's, which is not modified."""
        return config

    def start(self, model: Any, context: RunContext) -> Any:
        """Make and return the engine, or an object with its interface. Sets ``self.engine``, too."""
        raise NotImplementedError

    def begin_step(self, step: int) -> None:
        """Prepare ``step``, before its first forward."""

    def phase(self) -> str:
        """Return the kind of the last step, by which logs and medians tell steps apart."""
        return "plain"

    def trained(self) -> frozenset[str] | None:
        """Return the names of the parameters that the last step was to change; None for all that require gradients."""
        return None

    def gradient_bytes(self) -> int:
        """Return the bytes held for gradients now."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Return the bytes of the optimizer's states now, without master weights."""
        raise NotImplementedError

    def master_bytes(self) -> int:
        """Return the bytes of fp32 copies of weights now."""
        return 0

    def processor_seconds(self) -> float:
        """Return the processor time that training has taken since the process began, user and system, all threads."""
        return time.process_time()

    def precision(self, config: Mapping[str, Any]) -> str:
        """Return the dtype it computes in, and that of the kept weights if it differs from ZeRO's."""
        return DsConfig.of(config).arithmetic

    def loading_dtype(self, config: Mapping[str, Any]) -> str:
        """Return the dtype in which the model's weights are read."""
        return "float32"

    def faults(self) -> list[str]:
        """Return sentences on settings that this method did not follow."""
        return []

    def result(self) -> tuple[Any, Mapping[str, torch.Tensor] | None]:
        """End the training; return the model and, on the rank that saves them, its weights. Collective."""
        return self.engine.module, compat.whole_state_dict(self.engine)


def without_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without AdaGradSelect."""
    return {name: value for name, value in config.items() if name != SECTION}


def package(name: str, distribution: str | None = None) -> ModuleType:
    """Import and return a peer's package. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"This method needs the package {distribution or name}. Install it with: pip install 'ds-agsel[peers]'"
        ) from None
