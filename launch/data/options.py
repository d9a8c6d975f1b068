"""The options about data: names, defaults, choices. Light: a command line reads it before it loads anything."""

from __future__ import annotations

from dataclasses import dataclass

BUILTIN = "builtin"
WRONG_ROWS_FILE = "wrong_rows.json"  # places in the train split of rows with a wrong answer, the truth to grade by
DATA_VARIABLE = "DS_AGSEL_DATA"  # names a folder of local copies: gsm8k/train.jsonl, gsm8k/test.jsonl, …
CHAT_TEMPLATE_CHOICES = ("auto", "always", "never")


@dataclass(frozen=True)
class Preset:
    """A well-known data set: its address on the hub, its columns, and the pattern to remove from its completions."""

    hub_name: str
    hub_config: str | None
    prompt_column: str
    completion_column: str
    remove_pattern: str | None = None


PRESETS = {
    # GSM8K writes a calculator's notes, <<48/2=24>>, into its answers; they are no part of the text to learn.
    "gsm8k": Preset("openai/gsm8k", "main", "question", "answer", remove_pattern=r"<<[^<>]*>>"),
    "metamathqa": Preset("meta-math/MetaMathQA", None, "query", "response"),
    # MATH: 7500 and 5000 problems, whose answers are in \boxed{}. The authors' own copy was taken off the hub.
    "math": Preset("DigitalLearningGmbH/MATH-lighteval", None, "problem", "solution"),
}


@dataclass(frozen=True)
class DataOptions:
    """The arguments of `load`; each field is the command line option of the same name."""

    dataset: str
    dataset_config: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    prompt_template: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    train_rows: int | None = None
    validation_rows: int = 200
    test_rows: int = 200
    builtin_level: int = 2
    builtin_wrong_percent: float = 0.0
    seed: int = 42
