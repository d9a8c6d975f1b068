"""HF Trainer (and TRL, whose trainers are Trainers): the selection in its logs, and the files of a run."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed import comm as dist
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from ds_agsel.config import SECTION
from ds_agsel.entry import frames
from ds_agsel.errors import ConfigError
from ds_agsel.files import write_atomically
from ds_agsel.report import metrics
from ds_agsel.report.log import METRICS_FILE, SUMMARY_FILE, JsonLines, SelectionLog
from ds_agsel.zero.selective import SelectiveStep

logger = logging.getLogger("ds_agsel")


class SelectionCallback(TrainerCallback):
    """Adds the selection to the Trainer's logs, for all its reporters, and writes the files of a run.

    Each training log gains ``adagrad_select/...`` (`ds_agsel.report.metrics`): phase, ε, saved bytes, every block's
    update count, and ``selected/BLOCK``, the share of the steps since the last log that updated it. ``blocks.json``,
    ``selection.jsonl``, ``metrics.jsonl`` and, when training ends, ``summary.json``, which `ds-agsel report` and
    `ds-agsel watch` read, are written on rank 0.

    Args:
        folder: where the files go; None: ``args.output_dir``.
        required: raise ConfigError when training begins without a selection, which a Trainer otherwise never notices.
    """

    def __init__(self, folder: str | Path | None = None, *, required: bool = True) -> None:
        self.folder = folder
        self.required = required
        self._users_optimizer: Any = None
        self._optimizer: SelectiveStep | None = None
        self._selection_log: SelectionLog | None = None
        self._metrics: JsonLines | None = None
        self._last_log_seconds = 0.0
        self._last_log_step = 0

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._users_optimizer = optimizer
        _take_places(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        _take_places(self)
        self._optimizer = _selective(optimizer)
        if self._optimizer is None:
            if self.required:
                raise ConfigError(_what_is_missing(args))
            return
        if self._users_optimizer is not None:
            logger.warning(
                "Trainer(optimizers=(%s, ...)) is not used: under DeepSpeed the Trainer makes its optimizer from the "
                "ds_config or TrainingArguments. Set learning rate, betas and decay there.",
                type(self._users_optimizer).__name__,
            )
        self._last_log_seconds, self._last_log_step = time.perf_counter(), state.global_step
        if dist.get_rank() == 0:  # on a CPU, Accelerate may think each rank the main process
            folder = Path(args.output_dir if self.folder is None else self.folder)
            (folder / SUMMARY_FILE).unlink(missing_ok=True)  # left by an earlier run; this run is not finished
            self._selection_log = SelectionLog(folder, self._optimizer)
            path = folder / METRICS_FILE
            self._metrics = JsonLines(path, _lines_before(path, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._selection_log is not None:
            self._selection_log.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._optimizer is None or not logs or "loss" not in logs:
            return
        selection = self._optimizer.selection
        scalars = {
            **metrics.scalars(selection),
            **metrics.block_counts(selection),
            **metrics.block_shares(selection, state.global_step - self._last_log_step),
        }
        logs.update({f"{SECTION}/{name}": value for name, value in scalars.items()})
        if self._metrics is not None:
            now, steps = time.perf_counter(), max(1, state.global_step - self._last_log_step)
            self._metrics.write(
                {
                    "event": "train",
                    "step": state.global_step - 1,
                    "epoch": state.epoch,
                    "loss": logs["loss"],
                    "lr": logs.get("learning_rate"),
                    "grad_norm": logs.get("grad_norm"),
                    "phase": selection.history[-1].phase if selection.history else None,
                    "seconds": (now - self._last_log_seconds) / steps,  # of one step, mean of those since the last log
                }
            )
            self._last_log_seconds = now
        self._last_log_step = state.global_step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._metrics is not None and metrics and "eval_loss" in metrics:
            self._metrics.write({"event": "validation", "step": state.global_step, "loss": metrics["eval_loss"]})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for log in (self._selection_log, self._metrics):
            if log is not None:
                log.close()
        if self._optimizer is not None and self._metrics is not None:
            selection = self._optimizer.selection
            summary = {
                "steps": state.global_step,
                "epochs": state.epoch,
                "policy": selection.config.policy,
                "update_counts": {b.name: n for b, n in zip(selection.blocks, selection.update_counts, strict=True)},
            }
            write_atomically(self._metrics.path.with_name(SUMMARY_FILE), json.dumps(summary, indent=1) + "\n")
        self._selection_log = self._metrics = None


def _selective(optimizer: Any) -> SelectiveStep | None:
    """Return our optimizer from inside Accelerate's wrappers; None if it is another one."""
    while optimizer is not None and not isinstance(optimizer, SelectiveStep):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _what_is_missing(args: TrainingArguments) -> str:
    start = "SelectionCallback: this Trainer updates all blocks at every step, as no selection is engaged. "
    if not args.deepspeed:
        return start + "TrainingArguments.deepspeed is not set. Give it a ds_config with an adagrad_select section."
    section = getattr(getattr(args, "hf_deepspeed_config", None), "config", {}).get(SECTION)
    if section is None or section.get("enabled") is False:
        return start + (
            f"The ds_config's {SECTION} section is {'missing' if section is None else 'disabled'}. Add "
            f'"{SECTION}": {{}} to it, or SelectionCallback(required=False).'
        )
    if not hasattr(deepspeed.initialize, "__wrapped__"):
        return start + "ds_agsel.install() was not called. Call it before Trainer.train()."
    return start + (
        "The Trainer's optimizer is not DeepSpeed's ZeRO optimizer. Set zero_optimization.stage to 1, 2 or 3, and "
        "leave use_cpu to DS_ACCELERATOR=cpu."
    )


class _ShorterConsole(TrainerCallback):
    """Takes the values of single blocks out of the logs again before the Trainer prints them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = {} if logs is None else logs
        of_blocks = (f"{SECTION}/block_counts/", f"{SECTION}/selected/")
        for name in [name for name in logs if name.startswith(of_blocks)]:
            del logs[name]


def _take_places(callback: SelectionCallback) -> None:
    """Put ``callback`` first in the handler that is calling it, and a `_ShorterConsole` before the printing one.

    What ``callback`` adds to the logs then reaches all others: reporters stand before a user's callbacks. The callback
    that prints is last.
    """
    for handler, _ in frames.methods_of(CallbackHandler.__module__, CallbackHandler.__name__):
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
        printing = [isinstance(other, (PrinterCallback, ProgressCallback)) for other in handler.callbacks]
        if any(printing) and not any(isinstance(other, _ShorterConsole) for other in handler.callbacks):
            handler.callbacks.insert(printing.index(True), _ShorterConsole())
        return


def _lines_before(path: Path, global_step: int) -> int:
    """Return how many lines of an earlier metrics.jsonl were written before step ``global_step``."""
    if global_step == 0 or not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            return number
        last = global_step if record.get("event") == "validation" else global_step - 1
        if record.get("step", 0) > last:
            return number
    return len(lines)
