"""Examples for training, validation and testing: from the hub, from files, or made here, as text columns."""

from __future__ import annotations

import json
import os
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from ds_agsel.errors import ConfigError, DataError

from . import arithmetic

BUILTIN = "builtin"
DATA_VARIABLE = "DS_AGSEL_DATA"  # names a folder of local copies: gsm8k/train.jsonl, gsm8k/test.jsonl, …
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_SPLIT_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_KNOWN_COLUMNS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("query", "response"),
    ("problem", "solution"),
)


@dataclass(frozen=True)
class Preset:
    """A well-known data set: its address on the hub, its columns, and what to take out of its completions."""

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
    """What `load` is asked for; one field a command line option of the same name."""

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
    seed: int = 42


@dataclass(frozen=True)
class TextColumns:
    """Where a row's prompt and completion are. Picklable: tokenisation workers get it."""

    prompt: str | None
    completion: str
    template: str | None = None
    remove_pattern: str | None = None

    def prompt_of(self, row: dict[str, Any]) -> str:
        """The row's prompt, or the template filled with its columns."""
        return str(row[str(self.prompt)]) if self.template is None else self.template.format_map(row)

    def completion_of(self, row: dict[str, Any]) -> str:
        """The row's completion, without what the preset removes."""
        text = str(row[self.completion])
        return re.sub(self.remove_pattern, "", text) if self.remove_pattern else text

    @property
    def used(self) -> tuple[str, ...]:
        """Every column that is read."""
        prompts = (self.prompt,) if self.template is None else template_columns(self.template)
        return tuple(dict.fromkeys([*(name for name in prompts if name), self.completion]))


@dataclass(frozen=True)
class Splits:
    """The three parts of the data, and which columns of theirs are the text."""

    train: Dataset
    validation: Dataset
    test: Dataset
    columns: TextColumns = field(repr=False)


def load(options: DataOptions) -> Splits:
    """The data that ``options`` name, split in three.

    Where the data has no validation or test split, its rows are taken out of train by ``seed``. Raises
    DataError for data that is not there, empty, malformed or without the columns asked for; ConfigError for
    options that can't be.
    """
    if options.dataset == BUILTIN:
        return _builtin(options)
    preset = PRESETS.get(options.dataset)
    found = _load_parts(options, preset, needed="train")
    columns = _columns(options, preset, next(iter(found.values())))
    for name, part in found.items():
        _check_part(name, part, columns)
    return _split(found, options, columns)


def load_test(options: DataOptions) -> tuple[Dataset, TextColumns]:
    """The first ``options.test_rows`` test problems, in their order, and which columns of theirs are the text.

    Of a file they are its rows, of a folder or a hub name its test split. Raises what `load` raises.
    """
    if options.dataset == BUILTIN:
        splits = _builtin(options)
        return splits.test, splits.columns
    preset = PRESETS.get(options.dataset)
    part = _load_parts(options, preset, needed="test")["test"]
    columns = _columns(options, preset, part)
    _check_part("test", part, columns)
    return part.select(range(min(options.test_rows, len(part)))), columns


def local_copy(name: str) -> Path | None:
    """The folder of the preset ``name`` below the one that DS_AGSEL_DATA names; None where there is none.

    Raises DataError where the variable names no folder.
    """
    root = os.environ.get(DATA_VARIABLE)
    if not root or name not in PRESETS:
        return None
    if not Path(root).expanduser().is_dir():
        raise DataError(f"{DATA_VARIABLE}={root!r} is no folder. Name one that holds gsm8k/train.jsonl, or unset it.")
    folder = Path(root).expanduser() / name
    return folder if folder.is_dir() else None


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a prompt template such as ``"Question: {question}"`` names. Raises ConfigError."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"--prompt-template={template!r}: {error}. Name columns in braces, write {{{{ for a brace."
        ) from None
    if not names or not all(name.isidentifier() for name in names):
        raise ConfigError(
            f"--prompt-template={template!r} must name columns in braces, such as {{question}}, and "
            f"nothing else in them."
        )
    return tuple(dict.fromkeys(names))


def _builtin(options: DataOptions) -> Splits:
    sizes = {
        "train": options.train_rows or 4000,
        "validation": options.validation_rows,
        "test": options.test_rows,
    }
    parts = {
        split: Dataset.from_list(
            arithmetic.generate(split, max(size, 1), level=options.builtin_level, seed=options.seed)
        ).select(range(size))
        for split, size in sizes.items()
    }
    return Splits(**parts, columns=_columns(options, None, parts["train"]))


def _load_parts(options: DataOptions, preset: Preset | None, *, needed: str) -> dict[str, Dataset]:
    """The parts that there are, by "train", "validation" and "test"; ``needed`` is always there."""
    path = local_copy(options.dataset) or Path(options.dataset).expanduser()
    if path.is_dir():
        return {split: _read_file(file) for split, file in _files_in(path, needed).items()}
    if path.is_file():
        return {needed: _read_file(path)}
    if path.suffix in _READERS or options.dataset.startswith((".", "/", "~")):
        raise DataError(f"dataset={options.dataset!r} is not there. Give an existing file or folder.")
    return _load_from_hub(options, preset, needed)


def _files_in(folder: Path, needed: str) -> dict[str, Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _READERS)
    found: dict[str, Path] = {}
    for split, aliases in _SPLIT_ALIASES.items():
        matches = [path for path in files if path.stem in aliases]
        if len(matches) > 1:
            raise DataError(f"{folder} has more than one {split} file: {_listed(matches)}. Keep one of them.")
        if matches:
            found[split] = matches[0]
    if needed not in found:
        raise DataError(
            f"{folder} has no {needed} file; it holds {_listed(files) or 'no data file'}. "
            f"Name one {', '.join(f'{needed}{suffix}' for suffix in _READERS)}, or give the file itself."
        )
    return found


def _read_file(file: Path) -> Dataset:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise DataError(f"{file} is of an unknown kind. Use one of {', '.join(_READERS)}.")
    empty = DataError(f"{file} is empty. Put at least one example into it.")
    if file.stat().st_size == 0:
        raise empty
    try:
        part = load_dataset(reader, data_files=str(file), split="train")
    except Exception as error:  # datasets wraps its readers' errors in many classes of its own
        if "corresponds to no data" in str(error):  # blank lines, or a header alone
            raise empty from error
        problem = _malformed_json_line(file) if reader == "json" else None
        raise DataError(f"{file} can't be read: {problem or _reason(error)}") from error
    if len(part) == 0:
        raise empty
    return part


def _malformed_json_line(file: Path) -> str | None:
    """Which line of a JSON Lines file is no JSON object, and why; None where the trouble is elsewhere."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                return f"line {number} is no valid JSON ({error.msg}, column {error.colno}). Mend it."
            if not isinstance(value, dict):
                return f"line {number} is {type(value).__name__}, not an object with columns. Mend or remove it."
    return None


def _load_from_hub(options: DataOptions, preset: Preset | None, needed: str) -> dict[str, Dataset]:
    name = preset.hub_name if preset else options.dataset
    config = options.dataset_config or (preset.hub_config if preset else None)
    try:
        loaded = load_dataset(name, config)
    except Exception as error:  # from "no such name" to "no network", each with a class of its own
        raise DataError(
            f"dataset={options.dataset!r} can't be loaded from the hub: {_reason(error)} It is no local "
            f"file or folder "
            f"either. Known names: {BUILTIN}, {', '.join(PRESETS)}."
        ) from error
    if not isinstance(loaded, DatasetDict):
        return {needed: loaded}
    asked = {
        "train": options.train_split,
        "validation": options.validation_split,
        "test": options.test_split,
    }
    found: dict[str, Dataset] = {}
    for split, split_name in asked.items():
        if split_name is not None and split_name not in loaded:
            raise DataError(f"--{split}-split={split_name!r} is not in {name}. Its splits: {', '.join(loaded)}.")
        candidates = (split_name,) if split_name else _SPLIT_ALIASES[split]
        candidate = next((name for name in candidates if name in loaded), None)
        if candidate is not None:
            found[split] = loaded[candidate]
    if needed not in found:
        raise DataError(f"{name} has no split {needed!r}. Choose --{needed}-split among {', '.join(loaded)}.")
    return found


def _columns(options: DataOptions, preset: Preset | None, part: Dataset) -> TextColumns:
    present = part.column_names
    known: tuple[str | None, str | None] = (None, None)
    if preset is not None:
        known = (preset.prompt_column, preset.completion_column)
    else:
        known = next((pair for pair in _KNOWN_COLUMNS if set(pair) <= set(present)), known)
    prompt = options.prompt_column or known[0]
    completion = options.completion_column or known[1]
    if completion is None or (prompt is None and options.prompt_template is None):
        raise DataError(
            f"dataset={options.dataset!r} has the columns {', '.join(present)}: which are prompt and "
            f"completion can't "
            "be told. Name them with --prompt-column or --prompt-template, and --completion-column."
        )
    columns = TextColumns(prompt, completion, options.prompt_template, preset.remove_pattern if preset else None)
    missing = [name for name in columns.used if name not in present]
    if missing:
        raise DataError(
            f"dataset={options.dataset!r} has no column {_listed(missing)}. Its columns: {', '.join(present)}."
        )
    return columns


def _check_part(name: str, part: Dataset, columns: TextColumns) -> None:
    missing = [column for column in columns.used if column not in part.column_names]
    if missing:
        raise DataError(
            f"The {name} split has no column {_listed(missing)}. Its columns: {', '.join(part.column_names)}."
        )
    if len(part) == 0:
        raise DataError(f"The {name} split is empty. Put at least one example into it.")


def _split(found: dict[str, Dataset], options: DataOptions, columns: TextColumns) -> Splits:
    train = found["train"].shuffle(seed=options.seed)
    wanted = {"validation": options.validation_rows, "test": options.test_rows}
    parts: dict[str, Dataset] = {}
    for split, rows in wanted.items():
        if split in found:
            parts[split] = found[split].select(range(min(rows, len(found[split]))))
        elif rows < len(train):
            parts[split], train = train.select(range(rows)), train.select(range(rows, len(train)))
        else:
            raise DataError(
                f"The data has no {split} split, and --{split}-rows={rows} of its {len(train)} remaining "
                f"train rows "
                "would leave none to train on. Ask for fewer."
            )
    if options.train_rows is not None:
        train = train.select(range(min(options.train_rows, len(train))))
    return Splits(train, parts["validation"], parts["test"], columns)


def _listed(names: list[Any]) -> str:
    return ", ".join(repr(name.name if isinstance(name, Path) else name) for name in names)


def _reason(error: BaseException) -> str:
    """The first line of the innermost error: it says what happened, the outer ones only that it did."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".") + "."
