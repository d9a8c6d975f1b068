"""One training run: set up, train, evaluate, save, leave. `launch/train.py` is its command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from ds_agsel import processor
from ds_agsel.ds_config import DsConfig, read_ds_config
from ds_agsel.errors import CheckpointError, ConfigError, TrainingError
from ds_agsel.report.log import METRICS_FILE, JsonLines, SelectionLog

from .. import methods
from ..data import batches, encoding, packing, sources
from ..evaluation import scoring
from ..methods.zero import Zero
from . import checkpoints, hardware, models, options, outputs, ranks, settings
from .costs import Costs
from .faults import FaultWatch
from .objective import completion_loss_sum
from .stopping import StopRequest

_STATE = "launch_train"  # our key in a checkpoint's client_state
_SECONDS_BETWEEN_BARS = 10  # in a log file; a terminal gets tqdm's own


class Job:
    """A run as its options describe it. All methods are collective."""

    def __init__(self, wanted: argparse.Namespace, stop: StopRequest) -> None:
        self.options = wanted
        self.stop = stop
        self.output = Path(wanted.output)
        self.checkpoints = self.output / "checkpoints"
        self.started = time.monotonic()
        self.method = methods.make(wanted.method, wanted.method_option) if wanted.method else Zero("as configured", {})
        self.method.check(wanted)
        self.raw_config = self.method.edit(read_ds_config(wanted.deepspeed_config))
        ranks.main_first(self._prepare_output)
        _seed_everything(wanted.seed)
        self._load_data()
        self._start_engine()
        # What happened so far; a checkpoint carries it.
        self.step = 0
        self.exact_before: float | None = None
        self.exact_after: float | None = None
        self.validation: list[tuple[int, float]] = []
        self.train_losses: list[float] = []
        self.nonfinite_in_a_row = 0
        self.log_lines = 0
        if wanted.resume:
            self._load_checkpoint()
        self.metrics: JsonLines | None = None
        self.selection_log: SelectionLog | None = None
        self.records: list[dict[str, Any]] = []  # this process's train records

    # -- setting up

    def _prepare_output(self) -> None:
        """Make the output folder, or see that there is something to resume from."""
        if self.options.resume:
            if not checkpoints.are_there(self.checkpoints):
                raise CheckpointError(f"--resume: {self.checkpoints} has no checkpoint. Start without --resume.")
            return
        leftovers = ("metrics.jsonl", "selection.jsonl", "blocks.json", "checkpoints", "summary.json", "model")
        marks = [self.output / name for name in leftovers]
        if any(mark.exists() for mark in marks):
            # Another rank may look after the main one has begun to write: only the main rank's word counts.
            if not self.options.overwrite and ranks.is_main():
                raise ConfigError(
                    f"--output={self.options.output!r} holds an earlier run. Use --resume to go on with "
                    f"it, --overwrite "
                    "to remove it, or another folder."
                )
            for mark in marks if ranks.is_main() else ():
                shutil.rmtree(mark) if mark.is_dir() else mark.unlink(missing_ok=True)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output={self.options.output!r} can't be made: {error.strerror}. Give a folder to write to."
            ) from None

    def _load_data(self) -> None:
        wanted = self.options
        self.tokenizer = ranks.main_first(
            lambda: models.load_tokenizer(wanted.model, trust_remote_code=wanted.trust_remote_code)
        )
        self.batching = settings.batching(
            self.raw_config, dist.get_world_size(), wanted.micro_batch_size, wanted.accumulation
        )

        def load() -> tuple[tuple[str, ...], dict[str, encoding.Encoded]]:
            splits = sources.load(options.data_options(wanted))
            encoder = encoding.Encoder(
                tokenizer=self.tokenizer,
                columns=splits.columns,
                max_tokens=wanted.sequence_length,
                use_chat_template=encoding.wants_chat_template(wanted.chat_template, self.tokenizer),
                system=wanted.system,
            )
            parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
            drop = wanted.long_prompts == "drop"
            last_only = dataclasses.replace(encoder, every_answer=False)  # exact match asks one question a row
            return splits.notes, {
                name: encoding.encode(
                    name,
                    part,
                    last_only if name == "test" else encoder,
                    workers=wanted.workers,
                    drop_long_prompts=drop,
                )
                for name, part in parts.items()
            }

        notes, self.encoded = ranks.main_first(load)
        for note in notes:
            self._say(note)
        train = self.encoded["train"]
        self.rows: list[tuple[int, ...]] = [(index,) for index in range(len(train.rows))]
        lengths = train.lengths
        if wanted.packing:
            self.rows = batches.pack(train.lengths, wanted.sequence_length)
            lengths = np.asarray([int(train.lengths[list(row)].sum()) for row in self.rows])
        self.epochs = batches.EpochPlan(lengths, self.batching, wanted.seed)
        self.total_steps = wanted.steps or max(1, math.ceil(wanted.epochs * self.epochs.steps_per_epoch))
        self._say(
            f"{len(train.rows)} training rows ({train.lengths.mean():.0f} tokens, "
            f"{train.label_numel.mean():.0f} of them "
            f"to learn), {train.cut_rows} cut to {wanted.sequence_length} tokens ({train.cut_numel} tokens "
            f"lost), "
            f"{train.dropped_rows} dropped; {self.epochs.steps_per_epoch} steps an epoch, "
            f"{self.total_steps} to do"
        )

    def _start_engine(self) -> None:
        wanted = self.options
        model = ranks.main_first(
            lambda: models.load_model(
                wanted.model,
                trust_remote_code=wanted.trust_remote_code,
                gradient_checkpointing=wanted.gradient_checkpointing,
            )
        )
        self._check_model(model)
        self.keeps_last_logits = models.keeps_last_logits(model)
        overrides = {"select_percent": wanted.select_percent, "policy": wanted.policy}
        config = settings.complete(
            self.raw_config,
            batches=self.batching,
            steps_per_epoch=self.epochs.steps_per_epoch,
            total_steps=self.total_steps,
            lr=wanted.lr,
            seed=wanted.seed,
            section={name: value for name, value in overrides.items() if value is not None},
        )
        self._warn_of_slow_arithmetic(config)
        self.precision = self.method.precision(config)
        self.watch = FaultWatch(model) if wanted.method else None
        self.engine = self.method.start(model, methods.Setting(config, self.epochs.steps_per_epoch, wanted.seed))
        self.engine.train()
        self.costs = Costs(self.method.processor_seconds)
        if self.watch is not None:
            self.watch.engine_made(self.engine.module)
        if wanted.compile:
            self.engine.compile()  # layer by layer, where there is a selection
        self.selection = getattr(self.engine, "selection", None)  # none without the section: plain DeepSpeed

    def _check_model(self, model: Any) -> None:
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and self.options.sequence_length > longest:
            reached = int(max(part.lengths.max(initial=0) for part in self.encoded.values()))
            if self.options.packing or reached > longest:
                raise ConfigError(
                    f"--sequence-length={self.options.sequence_length} is more than the {longest} tokens "
                    f"that "
                    f"{self.options.model} takes. Use {longest} or less."
                )
        if self.options.packing:
            packing.check(model, self.options.model, int(self.encoded["train"].lengths.max()))

    def _warn_of_slow_arithmetic(self, config: dict[str, Any]) -> None:
        on_host = get_accelerator().device_name() == "cpu"
        read = DsConfig.of(config)
        offloads, computed = read.offload_optimizer.is_on, read.arithmetic
        if (on_host or offloads) and processor.describe()["warning"]:
            self._say(f"warning: {processor.describe()['warning']}")
        if on_host and computed in ("bf16", "autocast bfloat16") and not hardware.bf16_is_fast():
            self._say(
                f"warning: {computed} on this processor, which has no instructions for it, is many times "
                'slower than fp32. Use "bf16": {"enabled": "auto"}, or leave it out.'
            )

    # -- the run

    def run(self) -> bool:
        """Train and evaluate to the end. Returns True where a signal stopped it before."""
        if ranks.is_main():
            self.metrics = JsonLines(self.output / METRICS_FILE, self.log_lines)
            if self.selection is not None:
                self.selection_log = SelectionLog(self.output, self.engine.optimizer)
        try:
            if not self.options.resume:
                self._evaluate_loss()
                if not self.options.skip_test_before:
                    self.exact_before = self._evaluate_answers("before")
            stopped = self._train()
            if stopped:
                self._leave()
                return True
            if not self.validation or self.validation[-1][0] != self.step:
                self._evaluate_loss()
            self.exact_after = self._evaluate_answers("after")
            if self.stop.agreed():
                self._leave()
                return True
            self._finish()
            return False
        finally:
            for log in (self.metrics, self.selection_log):
                if log is not None:
                    log.close()

    def _train(self) -> bool:
        """Steps until the last or a stop signal; returns whether it was the signal."""
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not ranks.is_main(),
            mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_BARS,
            dynamic_ncols=True,
            unit="step",
            desc="training",
        )
        with bar:
            while self.step < self.total_steps:
                if self.stop.agreed():
                    return True
                record = self._train_step()
                self.step += 1
                bar.set_postfix_str(
                    f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {record['phase']}, "
                    f"{record['tokens'] / record['seconds']:.0f} tokens/s",
                    refresh=False,
                )
                bar.update()
                self._log(record)
                self._check_finite(record)
                wanted = self.options
                if wanted.evaluate_every and self.step % wanted.evaluate_every == 0:
                    self._evaluate_loss()
                if wanted.checkpoint_every and self.step % wanted.checkpoint_every == 0:
                    self._save_checkpoint()
        return False

    def _train_step(self) -> dict[str, Any]:
        """One step between the looks at what it costs and does."""
        if self.watch is not None:
            self.watch.before_step()
        self.costs.start_step()
        record = self._step()
        self.costs.end_step()
        self.costs.note(optimizer_state_bytes=self.method.state_bytes(), master_weight_bytes=self.method.master_bytes())
        if self.watch is not None:
            self.watch.after_step(record, self.method.trained())
        return {**record, "processor_seconds": self.costs.processor_seconds}

    def _step(self) -> dict[str, Any]:
        began = time.perf_counter()
        # Dropout's draws belong to the step: a resumed run makes the same.
        torch.manual_seed(_mixed_seed(self.options.seed, self.step, dist.get_rank()))
        members = self.epochs.rows_of(self.step)
        train = self.encoded["train"]
        examples = [example for row in members.ravel() for example in self.rows[row]]
        label_numel = int(train.label_numel[examples].sum())
        lr = self.engine.get_lr()[0]
        self.method.begin_step(self.step)
        applied = len(self.selection.history) if self.selection is not None else 0
        # DeepSpeed divides by ranks and micro-steps; the loss is the mean over all tokens of the step
        # instead, so that each counts the same wherever it lies.
        scale = self.batching.accumulation * self.batching.world_size / label_numel
        loss_sum = 0.0
        seconds = {"forward_seconds": 0.0, "backward_seconds": 0.0, "step_seconds": 0.0}
        for micro_batch in self._micro_batches(members):
            marks = [time.perf_counter()]
            loss = completion_loss_sum(self.engine, micro_batch, keeps_last_logits=self.keeps_last_logits)
            loss_sum += loss.item()
            marks.append(time.perf_counter())
            self.engine.backward(loss * scale)
            marks.append(time.perf_counter())
            self.costs.note(gradient_bytes=self.method.gradient_bytes())
            marks.append(time.perf_counter())
            self.engine.step()
            marks.append(time.perf_counter())
            for name, start in zip(seconds, (0, 1, 3)):
                seconds[name] += marks[start + 1] - marks[start]
        [loss_sum] = ranks.add_up(loss_sum)
        phase = self.method.phase()
        if self.selection is not None:
            phase = "skipped"
            if len(self.selection.history) > applied:
                phase = self.selection.history[-1].phase
            if self.selection_log is not None:
                self.selection_log.update()
        norm = self.engine.get_global_grad_norm()
        return {
            "event": "train",
            "step": self.step,
            "epoch": self.step // self.epochs.steps_per_epoch,
            "loss": loss_sum / label_numel,
            "lr": lr,
            "phase": phase,
            "grad_norm": None if norm is None else float(norm),
            "tokens": int(train.lengths[examples].sum()),
            "seconds": time.perf_counter() - began,
            **seconds,
        }

    def _micro_batches(self, members: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        train = self.encoded["train"].rows
        for rows in members[:, dist.get_rank()]:
            examples = [[train[index] for index in self.rows[row]] for row in rows]
            batch = batches.collate(examples, self.tokenizer.pad_token_id, packed=self.options.packing)
            yield scoring.to_device(batch, self.engine.device)

    def _check_finite(self, record: dict[str, Any]) -> None:
        self.train_losses.append(record["loss"])
        if math.isfinite(record["loss"]):
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row > self.options.max_nonfinite:
            rows = self.epochs.rows_of(record["step"]).ravel()
            raise TrainingError(
                f"The loss was {record['loss']} at step {record['step']} (epoch {record['epoch']}, lr "
                f"{record['lr']:.2e}, "
                f"training rows {', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}), the "
                f"{self.nonfinite_in_a_row}. non-finite one in a row; "
                f"--max-nonfinite={self.options.max_nonfinite} are "
                "allowed. Lower the lr, or look into these rows; --resume goes on from the newest checkpoint."
            )

    # -- evaluating

    def _evaluate_loss(self) -> None:
        loss = scoring.validation_loss(
            self.engine,
            self.encoded["validation"],
            batch_size=self.options.evaluation_batch_size,
            pad_token_id=self.tokenizer.pad_token_id,
            keeps_last_logits=self.keeps_last_logits,
        )
        if loss is None:
            return
        self.validation.append((self.step, loss))
        self._log({"event": "validation", "step": self.step, "loss": loss})
        self._say(f"validation loss after {self.step} steps: {loss:.4f}")
        if ranks.is_main() and self.engine.monitor.enabled:
            self.engine.monitor.write_events([("Validation/loss", loss, self.engine.global_samples)])

    def _evaluate_answers(self, when: str) -> float | None:
        if len(self.encoded["test"].rows) > 0:
            self._say(f"generating answers to {len(self.encoded['test'].rows)} test problems")
        began = time.monotonic()
        match = scoring.exact_match(
            self.engine,
            self.tokenizer,
            self.encoded["test"],
            batch_size=self.options.evaluation_batch_size,
            max_new_tokens=self.options.max_new_tokens,
            stop=self.stop,
        )
        if match is None:
            return None
        self._log({"event": "exact_match", "step": self.step, "percent": match.percent})
        self._say(
            f"exact match {when} training: {match.correct} of {match.total} ({match.percent:.1f} %), "
            f"{time.monotonic() - began:.0f} s"
        )
        if ranks.is_main():
            lines = [json.dumps(vars(generation), ensure_ascii=False) for generation in match.generations]
            (self.output / f"answers_{when}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return match.percent

    # -- saving

    def _save_checkpoint(self) -> Path:
        if ranks.is_main():  # whose client_state is the one that is saved
            self.log_lines = self.metrics.num_lines if self.metrics else 0
        state = {
            "step": self.step,
            "log_lines": self.log_lines,
            "position": self._position_settings(),
            "exact_before": self.exact_before,
            "validation": self.validation,
            "train_losses": self.train_losses,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "processor_seconds": self.costs.processor_seconds,
        }
        return checkpoints.save(
            self.engine, self.checkpoints, self.step, {_STATE: state}, keep=self.options.keep_checkpoints
        )

    def _position_settings(self) -> dict[str, Any]:
        """What must be the same for the data to go on where it stopped."""
        return {
            "dataset": self.options.dataset,
            "seed": self.options.seed,
            "training rows": len(self.rows),
            "rows per step": self.batching.rows_per_step,
            "total steps": self.total_steps,
        }

    def _load_checkpoint(self) -> None:
        checkpoint, client_state = checkpoints.load(self.engine, self.checkpoints)
        state = client_state.get(_STATE)
        if state is None:
            raise CheckpointError(f"{checkpoint} was not written by launch/train.py. Start without --resume.")
        for name, here in self._position_settings().items():
            there = state["position"][name]
            if there != here:
                raise CheckpointError(
                    f"{checkpoint} was written by a run with {name} {there}; this one has {here}. "
                    "Resume with the same settings, or start anew in another --output."
                )
        self.step = state["step"]
        self.exact_before = state["exact_before"]
        self.validation = [tuple(entry) for entry in state["validation"]]
        self.train_losses = list(state["train_losses"])
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.log_lines = state["log_lines"]
        self.costs.processor_seconds = state.get("processor_seconds", 0.0)
        self._say(f"going on from {checkpoint}, after {self.step} steps")

    def _leave(self) -> None:
        """Save what was done and say so, after a stop signal."""
        name = self.stop.signal.name if self.stop.signal else "a signal to another rank"
        if self.step == 0:
            self._say(f"stopped by {name} before the first step; nothing to save")
            return
        if not self.method.RESUMES:
            self._say(f"stopped by {name} after {self.step} steps; --method {self.method.name} saves no checkpoints")
            return
        path = self._save_checkpoint()
        self._say(f"stopped by {name} after {self.step} steps; saved {path}. Go on with --resume.")

    def _finish(self) -> None:
        """Final model, summary and table."""
        memory = self.costs.peak_memory_bytes()
        [resident] = ranks.add_up(memory["host"])
        summary = self._summary({**memory, "host_of_all_ranks": int(resident)})
        model, weights = self.method.result()
        if weights is not None:
            folder = self.output / "model"
            outputs.save_model(model, weights, self.tokenizer, folder)
            text = json.dumps(summary, indent=1)
            (self.output / "summary.json").write_text(text + "\n", encoding="utf-8")
            self._say(f"\n{outputs.table(summary)}\n\nmodel: {folder}")
        dist.barrier()

    def _summary(self, peak_memory_bytes: dict[str, int]) -> dict[str, Any]:
        train = self.encoded["train"]
        seconds = sum(record["seconds"] for record in self.records)
        plain = "full" if self.selection is None else "adagrad_select"
        return {
            "method": self.options.method or plain,
            "method_options": dict(self.method.options),
            "model": self.options.model,
            "dataset": self.options.dataset,
            "deepspeed_config": self.options.deepspeed_config,
            "ranks": dist.get_world_size(),
            "precision": self.precision,
            "steps": self.step,
            "rows_per_step": self.batching.rows_per_step,
            "loss": {
                "train_first": self.train_losses[0] if self.train_losses else None,
                "train_last": self.train_losses[-1] if self.train_losses else None,
                "validation_first": self.validation[0][1] if self.validation else None,
                "validation_last": self.validation[-1][1] if self.validation else None,
            },
            "exact_match_percent": {"before": self.exact_before, "after": self.exact_after},
            "seconds": time.monotonic() - self.started,
            "processor_seconds": self.costs.processor_seconds,
            "step_seconds": outputs.step_seconds(self.records, 0.5),
            "step_seconds_p90": outputs.step_seconds(self.records, 0.9),
            "tokens_per_second": sum(r["tokens"] for r in self.records) / seconds if seconds else None,
            "peak_memory_bytes": peak_memory_bytes,
            **self.costs.largest,
            "faults": self.method.faults() + (self.watch.sentences() if self.watch is not None else []),
            "selection": outputs.selection_summary(self.selection),
            "data": {
                "training_rows": len(train.rows),
                "cut_rows": train.cut_rows,
                "cut_numel": train.cut_numel,
                "dropped_rows": train.dropped_rows,
            },
            "versions": outputs.versions(),
            "processor": processor.describe(),
        }

    def _log(self, record: dict[str, Any]) -> None:
        if record["event"] == "train":
            self.records.append(record)
        if self.metrics is not None:
            self.metrics.write(record)

    def _say(self, text: str) -> None:
        if ranks.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _mixed_seed(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
