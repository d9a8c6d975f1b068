"""The engine: opens a step's window before its first forward, tells the monitor, and carries the selection along."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_agsel.blocks import repeated_layers
from ds_agsel.errors import CheckpointError, ConfigError, TrainingError
from ds_agsel.files import write_atomically
from ds_agsel.report import metrics
from ds_agsel.selection import Selection
from ds_agsel.zero import compat

STATE_FILE = "adagrad_select.json"
LATEST_FILE = "latest"
MONITOR_PREFIX = "AdaGradSelect"

logger = logging.getLogger("ds_agsel")


class SelectiveEngine(compat.DeepSpeedEngine):
    """A `DeepSpeedEngine` with a `selection`. Made by `ds_agsel.initialize`, not constructed."""

    selection: Selection

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.optimizer.open_window()
        return super().forward(*inputs, **kwargs)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """`DeepSpeedEngine.backward`. Raises TrainingError, with the remedy, for a loss that nothing selected reaches,
        of which DeepSpeed says that it is no scalar (engine.py:3397)."""
        if isinstance(loss, torch.Tensor) and not loss.requires_grad:
            raise TrainingError(
                f"step {self.selection.plan.step}: the loss requires no gradient. With activation checkpointing, set "
                "use_reentrant=False (TrainingArguments: gradient_checkpointing_kwargs): the reentrant form drops the "
                "gradients of a segment whose inputs require none."
            )
        return super().backward(loss, *args, **kwargs)

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """`DeepSpeedEngine.step`; an applied step is told to DeepSpeed's monitor as ``AdaGradSelect/...`` scalars.

        The blocks' update counts follow every ``steps_per_print`` steps.
        """
        applied = len(self.selection.history)
        super().step(lr_kwargs)
        if len(self.selection.history) > applied and self.monitor.enabled and self.global_rank == 0:
            scalars = metrics.scalars(self.selection)
            if self.global_steps % self.steps_per_print() == 0:
                scalars.update(metrics.block_counts(self.selection))
            self.monitor.write_events([
                (f"{MONITOR_PREFIX}/{name}", value, self.global_samples) for name, value in scalars.items()
            ])

    def compile(
        self,
        backend: Any = None,
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """`DeepSpeedEngine.compile`, layer by layer instead of the whole module; idempotent.

        A whole-model graph depends on which blocks are frozen: torch 2.13 compiles it anew for each selection and,
        after 8, goes back to eager without a word. Layers share their graphs. Raises ConfigError for a model
        without repeated layers, a DeepCompile schedule and compiled autograd.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise ConfigError(
                f"engine.compile(schedule={schedule!r}, compiled_autograd_enabled={compiled_autograd_enabled}) "
                "can't be used with adagrad_select: both build one graph of all blocks' gradients. Leave them out."
            )
        if self.is_compiled:
            return
        layers = repeated_layers(self.module)
        if not layers:
            raise ConfigError(
                f"engine.compile(): {type(self.module).__name__} has no repeated layers to compile one by one. "
                "Call compile() on the parts of it that are worth it."
            )
        options = {**(compile_kwargs or {}), "backend": backend or get_accelerator().get_compile_backend()}
        for layer in layers:
            layer.compile(**options)
        compat.mark_compiled(self, options)
        logger.info("adagrad_select: compiled %d layers one by one, not the whole model.", len(layers))

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """`DeepSpeedEngine.save_checkpoint`, with the selection beside the weights as ``TAG/adagrad_select.json``.

        ``latest`` is written last, through a temporary file. Collective. Raises CheckpointError on every rank
        where any could not write; what this call wrote is then removed, and ``latest`` names the one before.
        """
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir) / tag
        overwrites = folder.exists()
        dist.barrier()  # every rank has looked before any makes the folder
        errors = _WriteErrors()
        with self.selection.thawed(), compat.writes_through(self, errors.attempt):
            errors.attempt(folder.mkdir, parents=True, exist_ok=True)
            failure = errors.first_of_all_ranks()
            if failure is None:
                super().save_checkpoint(
                    os.fspath(save_dir), tag, dict(client_state or {}), False, exclude_frozen_parameters
                )
                if self.global_rank == 0:
                    errors.attempt(write_atomically, folder / STATE_FILE, json.dumps(self.selection.state_dict()))
                failure = errors.first_of_all_ranks()
        if failure is not None:
            if self.global_rank == 0 and not overwrites:
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
            raise CheckpointError(
                f"checkpoint {folder} could not be written: {failure}. "
                f"'{LATEST_FILE}' still names the checkpoint before it. Make room, or save to another folder."
            )
        if save_latest:
            if self.global_rank == 0:
                write_atomically(Path(save_dir) / LATEST_FILE, tag)
            dist.barrier()
        return True

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], tag: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """`DeepSpeedEngine.load_checkpoint`, with the selection: counts, history and plan go on where they were.

        With ``load_module_only=True`` or ``load_optimizer_states=False`` the selection starts afresh. Raises
        CheckpointError for a checkpoint of other blocks, or one that plain DeepSpeed wrote, before anything is loaded.
        """
        load_dir = os.fspath(load_dir)
        names = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
        options = {**dict(zip(names, args)), **kwargs}
        with_states = options.get("load_optimizer_states", True) and not options.get("load_module_only", False)
        tag = _latest_tag(load_dir) if tag is None else str(tag)
        state = None
        if with_states and tag is not None:
            state = read_selection_state(Path(load_dir) / tag)
            self.selection.check_compatible(state, f"checkpoint {Path(load_dir) / tag}")
        with self.selection.thawed():
            result = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        if state is not None and result[0] is not None:
            self.selection.load_state_dict(state)
        return result


def _latest_tag(load_dir: str) -> str | None:
    path = Path(load_dir) / LATEST_FILE
    if not path.is_file():
        return None
    tag = path.read_text().strip()
    if not tag or Path(tag).name != tag:
        raise CheckpointError(
            f"{path} names the checkpoint {tag!r}, which is not a folder in {load_dir}. "
            "Write the tag of a whole checkpoint into it, or pass tag=."
        )
    return tag


def read_selection_state(folder: Path) -> dict[str, Any]:
    """The selection saved in a checkpoint folder. Raises CheckpointError where there is none, or a damaged one."""
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: plain DeepSpeed wrote it, or it is not whole. Its weights alone can be "
            "loaded, and selection then starts afresh: load_checkpoint(..., load_module_only=True)."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}). Load an earlier checkpoint with tag=.") from error


class _WriteErrors:
    """The errors that writing met on this rank. They are kept, not raised: one rank alone that raised would leave the
    others at a barrier."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def attempt(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call ``write``, unless an earlier attempt has failed."""
        if self._errors:
            return
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk
            self._errors.append(error)

    def first_of_all_ranks(self) -> str | None:
        """What went wrong, on this rank or on another; None where all went well. Collective."""
        failed = torch.tensor([bool(self._errors)], dtype=torch.int32, device=get_accelerator().current_device_name())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed.item():
            return None
        return f"{self._errors[0]}" if self._errors else "another rank could not write"
