"""The parts of a run, made in order: output folder, data, model, engine. Nothing is trained here."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from ds_agsel import processor
from ds_agsel.config import find_section, parse_section
from ds_agsel.ds_config import DsConfig, read_ds_config
from ds_agsel.errors import ConfigError
from ds_agsel.files import write_atomically
from ds_agsel.zero import build_ops

from .. import methods
from ..data import batches, encoding, packing, sources
from ..data.options import WRONG_ROWS_FILE
from ..methods.base import Method, RunContext
from ..methods.zero import Zero
from . import hardware, models, options, ranks, run_config
from .console import say
from .faults import FaultWatch
from .folder import RunFolder


@dataclass(frozen=True)
class RunData:
    """What a run trains and is tested on, tokenised.

    Attributes:
        encoded: by "train", "validation" and "test".
        rows: the examples of each training row, by index; several in one row with --packing.
        epochs: which rows each step takes.
    """

    tokenizer: PreTrainedTokenizerBase
    encoded: Mapping[str, encoding.Encoded]
    batching: batches.Batching
    rows: list[tuple[int, ...]]
    epochs: batches.EpochPlan
    total_steps: int

    @property
    def train(self) -> encoding.Encoded:
        """The training split."""
        return self.encoded["train"]

    @property
    def validation(self) -> encoding.Encoded:
        """The validation split."""
        return self.encoded["validation"]

    @property
    def test(self) -> encoding.Encoded:
        """The test split."""
        return self.encoded["test"]


@dataclass(frozen=True)
class Assembly:
    """A run that is ready to train.

    Attributes:
        engine: DeepSpeed's, or an object with its interface (`methods.plain_torch.TorchEngine`).
        selection: of the engine's blocks; None for plain DeepSpeed and for methods without one.
        precision: the dtype that it computes in, as text.
        keeps_last_logits: whether the model can compute the logits of given positions alone.
        watch: compares weights around each step; None unless --method is given.
    """

    options: argparse.Namespace
    folder: RunFolder
    method: Method
    data: RunData
    engine: Any
    selection: Any | None
    precision: str
    keeps_last_logits: bool
    watch: FaultWatch | None


def assemble(wanted: argparse.Namespace) -> Assembly:
    """Return the run that the options ``wanted`` describe.

    Collective. Raises ConfigError, DataError or CheckpointError, before anything is trained, if a part can't be made.
    """
    method = methods.make(wanted.method, wanted.method_option) if wanted.method else Zero("as configured", {})
    method.check(wanted)
    raw_config = method.edit(read_ds_config(wanted.deepspeed_config))
    folder = RunFolder(Path(wanted.output))
    ranks.main_first(lambda: folder.prepare(wanted))
    _seed_everything(wanted.seed)
    data = _load_data(wanted, raw_config)
    config = _complete(raw_config, wanted, data)
    model = ranks.main_first(
        lambda: models.load_model(
            wanted.model,
            dtype=method.loading_dtype(config),
            trust_remote_code=wanted.trust_remote_code,
            gradient_checkpointing=wanted.gradient_checkpointing,
        )
    )
    _check_model(model, wanted, data)
    context = RunContext(config, data.epochs.steps_per_epoch, wanted.seed, _support(config, wanted, data))
    _warn_of_slow_arithmetic(context.config)
    watch = FaultWatch(model) if wanted.method else None
    precision = method.precision(context.config)
    keeps_last_logits = models.keeps_last_logits(model)
    if ranks.is_first_here():
        build_ops.announce(_ops_of(context.config), say)
    engine = method.start(model, context)
    engine.train()
    if watch is not None:
        watch.engine_made(engine.module)
    if wanted.compile:
        engine.compile()  # layer by layer, where there is a selection
    return Assembly(
        options=wanted,
        folder=folder,
        method=method,
        data=data,
        engine=engine,
        selection=getattr(engine, "selection", None),
        precision=precision,
        keeps_last_logits=keeps_last_logits,
        watch=watch,
    )


def _ops_of(config: Mapping[str, Any]) -> list[str]:
    """Return the ops that DeepSpeed needs for AdamW, and compiles on first use."""
    if DsConfig.of(config).offload_optimizer.is_on:
        return [build_ops.CPU_ADAM_OP]
    return [build_ops.FUSED_ADAM_OP] if get_accelerator().device_name() == "cpu" else []


def _load_data(wanted: argparse.Namespace, raw_config: Mapping[str, Any]) -> RunData:
    tokenizer = ranks.main_first(
        lambda: models.load_tokenizer(wanted.model, trust_remote_code=wanted.trust_remote_code)
    )
    batching = run_config.batching(raw_config, dist.get_world_size(), wanted.micro_batch_size, wanted.accumulation)
    notes, encoded = ranks.main_first(lambda: _load_splits(wanted, tokenizer))
    for note in notes:
        say(note)
    train = encoded["train"]
    rows: list[tuple[int, ...]] = [(index,) for index in range(len(train.rows))]
    lengths = train.lengths
    if wanted.packing:
        rows = batches.pack(train.lengths, wanted.sequence_length)
        lengths = np.asarray([int(train.lengths[list(row)].sum()) for row in rows])
    epochs = batches.EpochPlan(lengths, batching, wanted.seed)
    total_steps = wanted.steps or max(1, math.ceil(wanted.epochs * epochs.steps_per_epoch))
    say(
        f"{len(train.rows)} training rows ({train.lengths.mean():.0f} tokens, {train.label_numel.mean():.0f} of them "
        f"to learn), {train.cut_rows} cut to {wanted.sequence_length} tokens ({train.cut_numel} tokens lost), "
        f"{train.dropped_rows} dropped; {epochs.steps_per_epoch} steps an epoch, {total_steps} to do"
    )
    return RunData(tokenizer, encoded, batching, rows, epochs, total_steps)


def _load_splits(
    wanted: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, ...], dict[str, encoding.Encoded]]:
    """Return remarks on the data, and its three splits, tokenised."""
    splits = sources.load(options.data_options(wanted))
    encoder = encoding.Encoder(
        tokenizer=tokenizer,
        columns=splits.columns,
        max_tokens=wanted.sequence_length,
        use_chat_template=encoding.wants_chat_template(wanted.chat_template, tokenizer),
        system=wanted.system,
    )
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    drop = wanted.long_prompts == "drop"
    if splits.wrong_rows and ranks.is_main():
        write_atomically(Path(wanted.output) / WRONG_ROWS_FILE, json.dumps(splits.wrong_rows) + "\n")
    encoders = dict.fromkeys(parts, encoder)
    encoders["test"] = replace(encoder, every_answer=False)  # exact match asks one question a row
    return splits.notes, {
        name: encoding.encode(name, part, encoders[name], workers=wanted.workers, drop_long_prompts=drop)
        for name, part in parts.items()
    }


def _complete(raw_config: Mapping[str, Any], wanted: argparse.Namespace, data: RunData) -> dict[str, Any]:
    overrides = {"select_percent": wanted.select_percent, "policy": wanted.policy}
    return run_config.complete(
        raw_config,
        batches=data.batching,
        steps_per_epoch=data.epochs.steps_per_epoch,
        total_steps=data.total_steps,
        lr=wanted.lr,
        seed=wanted.seed,
        section={**wanted.section, **{name: value for name, value in overrides.items() if value is not None}},
    )


def _support(config: Mapping[str, Any], wanted: argparse.Namespace, data: RunData) -> dict[str, Any]:
    """Return the support data that the section asks for, as arguments of `ds_agsel.initialize`: rows of --support."""
    section = find_section(config)
    if section is None:
        return {}
    parsed = parse_section(section)
    if not parsed.enabled or parsed.gast is None or not parsed.gast.needs_support_data:
        return {}
    pad_token_id = data.tokenizer.pad_token_id

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return batches.collate([[row] for row in rows], pad_token_id)

    return {"support_data": data.encoded[wanted.support].rows, "collate_fn": collate}


def _check_model(model: Any, wanted: argparse.Namespace, data: RunData) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and wanted.sequence_length > longest:
        reached = int(max(part.lengths.max(initial=0) for part in data.encoded.values()))
        if wanted.packing or reached > longest:
            raise ConfigError(
                f"--sequence-length={wanted.sequence_length} is more than the {longest} tokens that {wanted.model} "
                f"takes. Use {longest} or less."
            )
    if wanted.packing:
        packing.check(model, wanted.model, int(data.train.lengths.max()))


def _warn_of_slow_arithmetic(config: Mapping[str, Any]) -> None:
    on_host = get_accelerator().device_name() == "cpu"
    read = DsConfig.of(config)
    offloads, computed = read.offload_optimizer.is_on, read.arithmetic
    if (on_host or offloads) and processor.describe()["warning"]:
        say(f"warning: {processor.describe()['warning']}")
    if on_host and computed in ("bf16", "autocast bfloat16") and not hardware.bf16_is_fast():
        say(
            f"warning: {computed} on this processor, which has no instructions for it, is many times "
            'slower than fp32. Use "bf16": {"enabled": "auto"}, or leave it out.'
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
