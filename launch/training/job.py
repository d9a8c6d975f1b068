"""One run, from the first evaluation to the saved model, or to the checkpoint that a stop signal asks for."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from ds_agsel.report.log import JsonLines, SelectionLog

from ..evaluation import run_settings, scoring
from . import checkpoints, outputs, ranks, summary
from .assembly import Assembly, assemble
from .console import say
from .costs import Costs
from .loop import Loop
from .progress import Progress, from_checkpoint, position_of
from .stopping import StopRequest


def run(wanted: argparse.Namespace, stop: StopRequest) -> bool:
    """Do the run of the options ``wanted``; return True if a signal stopped it before its end. Collective."""
    return Job(wanted, stop).run()


class Job:
    """Evaluates, trains, logs and saves. All methods are collective."""

    def __init__(self, wanted: argparse.Namespace, stop: StopRequest) -> None:
        began = time.monotonic()
        self._stop = stop
        self._run: Assembly = assemble(wanted)
        data = self._run.data
        self._position = position_of(
            wanted, rows=len(data.rows), rows_per_step=data.batching.rows_per_step, total_steps=data.total_steps
        )
        self._costs = Costs(self._run.method.processor_seconds)
        self._progress = self._resume() if wanted.resume else Progress()
        self._costs.processor_seconds = self._progress.processor_seconds
        self._loop = Loop(self._run, self._progress, self._costs)
        self._summary = summary.Summary(self._run, self._progress, self._costs, began)
        self._metrics: JsonLines | None = None
        self._selection_log: SelectionLog | None = None

    def run(self) -> bool:
        """Train and evaluate to the end. Return True if a signal stopped it before."""
        if ranks.is_main():
            self._metrics = JsonLines(self._run.folder.metrics, self._progress.log_lines)
            if self._run.selection is not None:
                self._selection_log = SelectionLog(self._run.folder.path, self._run.engine.optimizer)
        try:
            return self._run_logged()
        finally:
            for log in (self._metrics, self._selection_log):
                if log is not None:
                    log.close()

    def _run_logged(self) -> bool:
        wanted, progress = self._run.options, self._progress
        if not wanted.resume:
            self._evaluate_loss()
            if not wanted.skip_test_before:
                progress.exact_before = self._evaluate_answers("before")
        if self._loop.train(self._stop.agreed, self._after_step):
            self._leave()
            return True
        if not progress.validation or progress.validation[-1][0] != progress.step:
            self._evaluate_loss()
        progress.exact_after = self._evaluate_answers("after")
        if self._stop.agreed():
            self._leave()
            return True
        self._finish()
        return False

    def _after_step(self, record: dict[str, Any]) -> None:
        wanted, step = self._run.options, self._progress.step
        if self._selection_log is not None:
            self._selection_log.update()
        self._summary.add(record)
        self._log(record)
        self._loop.check_finite(record)
        if wanted.evaluate_every and step % wanted.evaluate_every == 0:
            self._evaluate_loss()
        if wanted.checkpoint_every and step % wanted.checkpoint_every == 0:
            self._save_checkpoint()

    # -- evaluating

    def _evaluate_loss(self) -> None:
        run, progress = self._run, self._progress
        held_out = scoring.held_out_losses(
            run.engine,
            run.data.validation,
            batch_size=run.options.evaluation_batch_size,
            pad_token_id=run.data.tokenizer.pad_token_id,
            keeps_last_logits=run.keeps_last_logits,
        )
        if held_out is None:
            return
        loss = held_out.loss
        progress.validation.append((progress.step, loss))
        rows = {"row_sums": held_out.row_sums, "row_tokens": held_out.row_tokens}
        self._log({"event": "validation", "step": progress.step, "loss": loss, **rows})
        say(f"validation loss after {progress.step} steps: {loss:.4f}")
        if ranks.is_main() and run.engine.monitor.enabled:
            run.engine.monitor.write_events([("Validation/loss", loss, run.engine.global_samples)])

    def _evaluate_answers(self, when: str) -> float | None:
        run = self._run
        if len(run.data.test.rows) > 0:
            say(f"generating answers to {len(run.data.test.rows)} test problems")
        began = time.monotonic()
        match = scoring.exact_match(
            run.engine,
            run.data.tokenizer,
            run.data.test,
            batch_size=run.options.evaluation_batch_size,
            max_new_tokens=run.options.max_new_tokens,
            stop=self._stop,
        )
        if match is None:
            return None
        self._log({"event": "exact_match", "step": self._progress.step, "percent": match.percent})
        say(
            f"exact match {when} training: {match.correct} of {match.total} ({match.percent:.1f} %), "
            f"{time.monotonic() - began:.0f} s"
        )
        if ranks.is_main():
            lines = [json.dumps(vars(generation), ensure_ascii=False) for generation in match.generations]
            (run.folder.path / f"answers_{when}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return match.percent

    # -- saving

    def _save_checkpoint(self) -> Path:
        if ranks.is_main():  # whose client_state is the one that is saved
            self._progress.log_lines = self._metrics.num_lines if self._metrics else 0
        self._progress.processor_seconds = self._costs.processor_seconds
        return checkpoints.save(
            self._run.engine,
            self._run.folder.checkpoints,
            self._progress.step,
            self._progress.state(self._position),
            keep=self._run.options.keep_checkpoints,
        )

    def _resume(self) -> Progress:
        checkpoint, client_state = checkpoints.load(self._run.engine, self._run.folder.checkpoints)
        progress = from_checkpoint(checkpoint, client_state, self._position)
        say(f"going on from {checkpoint}, after {progress.step} steps")
        return progress

    def _leave(self) -> None:
        """Save what was done and say so, after a stop signal."""
        name = self._stop.signal.name if self._stop.signal else "a signal to another rank"
        step, method = self._progress.step, self._run.method
        if step == 0:
            say(f"stopped by {name} before the first step; nothing to save")
            return
        if not method.RESUMES:
            say(f"stopped by {name} after {step} steps; --method {method.name} saves no checkpoints")
            return
        path = self._save_checkpoint()
        say(f"stopped by {name} after {step} steps; saved {path}. Go on with --resume.")

    def _finish(self) -> None:
        """Save the final model and the summary, and print its table."""
        memory = self._costs.peak_memory_bytes()
        [resident] = ranks.add_up(memory["host"])
        found = self._summary.of_the_run({**memory, "host_of_all_ranks": int(resident)})
        model, weights = self._run.method.result()
        if weights is not None:
            folder = self._run.folder
            outputs.save_model(
                model,
                weights,
                self._run.data.tokenizer,
                folder.model,
                extra_files={run_settings.FILE: run_settings.as_text(self._run.options)},
            )
            folder.summary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            say(f"\n{summary.table(found)}\n\nmodel: {folder.model}")
        dist.barrier()

    def _log(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(record)
