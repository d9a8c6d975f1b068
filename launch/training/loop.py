"""The steps of a run: batches to the engine, one record a step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from tqdm import tqdm

from ds_agsel.errors import TrainingError

from ..data import batches
from ..evaluation import scoring
from . import ranks
from .assembly import Assembly
from .costs import Costs
from .objective import completion_loss_sum
from .progress import Progress

_SECONDS_BETWEEN_BARS = 10  # in a log file; a terminal gets tqdm's own
_TIMED = ("forward_seconds", "backward_seconds", "step_seconds")


class Loop:
    """Trains the run of an assembly, and counts its steps in ``progress``. All methods are collective."""

    def __init__(self, assembly: Assembly, progress: Progress, costs: Costs) -> None:
        self._run = assembly
        self._data = assembly.data
        self._engine = assembly.engine
        self._progress = progress
        self._costs = costs

    def train(self, stopped: Callable[[], bool], after_step: Callable[[dict[str, Any]], None]) -> bool:
        """Take steps until the last, or until ``stopped`` says so; return whether it did.

        ``after_step`` gets each step's record, as metrics.jsonl has it; ``progress`` counts that step already. Raises
        TrainingError after more non-finite losses in a row than --max-nonfinite allows.
        """
        bar = tqdm(
            total=self._data.total_steps,
            initial=self._progress.step,
            disable=not ranks.is_main(),
            mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_BARS,
            dynamic_ncols=True,
            unit="step",
            desc="training",
        )
        with bar:
            while self._progress.step < self._data.total_steps:
                if stopped():
                    return True
                record = self._watched_step()
                self._progress.step += 1
                self._progress.train_losses.append(record["loss"])
                bar.set_postfix_str(
                    f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {record['phase']}, "
                    f"{record['tokens'] / record['seconds']:.0f} tokens/s",
                    refresh=False,
                )
                bar.update()
                after_step(record)
        return False

    def _watched_step(self) -> dict[str, Any]:
        """Take one step, between looks at what it costs and what it changes."""
        method, watch = self._run.method, self._run.watch
        if watch is not None:
            watch.before_step()
        self._costs.start_step()
        record = self._step(self._progress.step)
        self._costs.end_step()
        self._costs.note(optimizer_state_bytes=method.state_bytes(), master_weight_bytes=method.master_bytes())
        if watch is not None:
            watch.after_step(record, method.trained())
        return {**record, "processor_seconds": self._costs.processor_seconds}

    def _step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        # Dropout's draws belong to the step: a resumed run makes the same.
        torch.manual_seed(_mixed_seed(self._run.options.seed, step, dist.get_rank()))
        members = self._data.epochs.rows_of(step)
        train = self._data.train
        examples = [example for row in members.ravel() for example in self._data.rows[row]]
        label_numel = int(train.label_numel[examples].sum())
        lr = self._engine.get_lr()[0]
        self._run.method.begin_step(step)
        last_selected = self._last_selected()
        # DeepSpeed divides by ranks and micro-steps; the loss is the mean over all tokens of the step
        # instead, so that each counts the same wherever it lies.
        batching = self._data.batching
        loss_sum, seconds = self._micro_steps(members, batching.accumulation * batching.world_size / label_numel)
        [loss_sum] = ranks.add_up(loss_sum)
        phase = self._run.method.phase()
        if self._run.selection is not None:
            selected = self._last_selected()
            phase = "skipped" if selected is None or selected is last_selected else selected.phase
        norm = self._engine.get_global_grad_norm()
        return {
            "event": "train",
            "step": step,
            "epoch": step // self._data.epochs.steps_per_epoch,
            "loss": loss_sum / label_numel,
            "lr": lr,
            "phase": phase,
            "grad_norm": None if norm is None else float(norm),
            "tokens": int(train.lengths[examples].sum()),
            "seconds": time.perf_counter() - began,
            **seconds,
        }

    def _last_selected(self) -> Any | None:
        """Return the selection's record of the last step that was applied, if any."""
        selection = self._run.selection
        return selection.history[-1] if selection is not None and selection.history else None

    def _micro_steps(self, members: np.ndarray, scale: float) -> tuple[float, dict[str, float]]:
        """Return this rank's sum of the loss over the step's tokens, and the seconds of each part."""
        loss_sum = 0.0
        seconds = dict.fromkeys(_TIMED, 0.0)
        for micro_batch in self._micro_batches(members):
            marks = [time.perf_counter()]
            loss = completion_loss_sum(self._engine, micro_batch, keeps_last_logits=self._run.keeps_last_logits)
            loss_sum += loss.item()
            marks.append(time.perf_counter())
            self._engine.backward(loss * scale)
            marks.append(time.perf_counter())
            self._costs.note(gradient_bytes=self._run.method.gradient_bytes())
            marks.append(time.perf_counter())
            self._engine.step()
            marks.append(time.perf_counter())
            for name, start in zip(_TIMED, (0, 1, 3)):
                seconds[name] += marks[start + 1] - marks[start]
        return loss_sum, seconds

    def _micro_batches(self, members: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        train = self._data.train.rows
        for rows in members[:, dist.get_rank()]:
            examples = [[train[index] for index in self._data.rows[row]] for row in rows]
            self._name_rows([self._data.rows[row] for row in rows])
            batch = batches.collate(examples, self._data.tokenizer.pad_token_id, packed=self._run.options.packing)
            yield scoring.to_device(batch, self._engine.device)

    def _name_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Name the rows of the next forward by their examples' places in the train split, where rows are chosen."""
        samples = None if self._run.selection is None else self._run.selection.samples
        if samples is not None:
            samples.name_rows(["+".join(map(str, row)) if len(row) > 1 else int(row[0]) for row in rows])

    def check_finite(self, record: dict[str, Any]) -> None:
        """Count non-finite losses in a row. Raise TrainingError if they are more than --max-nonfinite."""
        progress, allowed = self._progress, self._run.options.max_nonfinite
        if math.isfinite(record["loss"]):
            progress.nonfinite_in_a_row = 0
            return
        progress.nonfinite_in_a_row += 1
        if progress.nonfinite_in_a_row > allowed:
            rows = self._data.epochs.rows_of(record["step"]).ravel()
            raise TrainingError(
                f"The loss was {record['loss']} at step {record['step']} (epoch {record['epoch']}, lr "
                f"{record['lr']:.2e}, training rows {', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}), "
                f"the {progress.nonfinite_in_a_row}. non-finite one in a row; --max-nonfinite={allowed} are allowed. "
                "Lower the lr, or look into these rows; --resume goes on from the newest checkpoint."
            )


def _mixed_seed(*parts: int) -> int:
    """Return one 63-bit seed made of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
