"""Examples for training, validation and testing: from the hub, from files, or generated, as text columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from ds_agsel.errors import DataError

from . import arithmetic, chat, files, folders
from .columns import TextColumns, unused_text
from .options import BUILTIN, DATA_VARIABLE, PRESETS, DataOptions, Preset


@dataclass(frozen=True)
class _Known:
    """Columns that are prompt and completion by custom, and one that belongs before or after the prompt."""

    prompt: str
    completion: str
    before: str | None = None
    after: str | None = None


_KNOWN_COLUMNS = (
    _Known("prompt", "completion"),
    _Known("question", "answer", before="context"),
    _Known("instruction", "output", after="input"),  # Alpaca
    _Known("instruction", "response", after="context"),  # Dolly
    _Known("query", "response"),
    _Known("problem", "solution"),
)


@dataclass(frozen=True)
class Splits:
    """The three splits of the data, the names of their text columns, and remarks for the user.

    ``wrong_rows``: places in train of the rows that were given a wrong answer on purpose, ascending.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    columns: TextColumns = field(repr=False)
    notes: tuple[str, ...] = ()
    wrong_rows: tuple[int, ...] = ()


def load(options: DataOptions) -> Splits:
    """Load the data that ``options`` name, split in three.

    Where the data has no validation or test split, its rows are taken out of train by ``seed``. Raises
    DataError for data that is missing, empty, malformed or without the named columns; ConfigError for impossible
    options.
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
    """Load the first ``options.test_rows`` test problems, in their order, with the names of their text columns.

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
    """Return the folder of the preset ``name`` in the one that DS_AGSEL_DATA names; None if there is no such folder.

    Raises DataError if the variable names no folder.
    """
    root = os.environ.get(DATA_VARIABLE)
    if not root or name not in PRESETS:
        return None
    if not Path(root).expanduser().is_dir():
        raise DataError(f"{DATA_VARIABLE}={root!r} is no folder. Name one that holds gsm8k/train.jsonl, or unset it.")
    folder = Path(root).expanduser() / name
    return folder if folder.is_dir() else None


def _builtin(options: DataOptions) -> Splits:
    sizes = {
        "train": options.train_rows or 4000,
        "validation": options.validation_rows,
        "test": options.test_rows,
    }
    rows = {
        split: arithmetic.generate(split, max(size, 1), level=options.builtin_level, seed=options.seed)
        for split, size in sizes.items()
    }
    rows["train"], wrong = arithmetic.with_wrong_answers(rows["train"], options.builtin_wrong_percent, options.seed)
    parts = {split: Dataset.from_list(rows[split]).select(range(size)) for split, size in sizes.items()}
    return Splits(**parts, columns=_columns(options, None, parts["train"]), wrong_rows=tuple(wrong))


def _load_parts(options: DataOptions, preset: Preset | None, *, needed: str) -> dict[str, Dataset]:
    """Load the existing splits, by "train", "validation" and "test"; ``needed`` is always among them."""
    path = local_copy(options.dataset) or Path(options.dataset).expanduser()
    if path.is_dir():
        found = _chosen(folders.read(path, needed, options.dataset_config), options, str(path), needed)
    elif path.is_file():
        found = {needed: files.read([path])}
    elif path.suffix in files.SUFFIXES or options.dataset.startswith((".", "/", "~")):
        raise DataError(f"dataset={options.dataset!r} is not there. Give an existing file or folder.")
    else:
        found = _load_from_hub(options, preset, needed)
    return {split: files.numbered(part) for split, part in found.items()}


def _load_from_hub(options: DataOptions, preset: Preset | None, needed: str) -> dict[str, Dataset]:
    name = preset.hub_name if preset else options.dataset
    config = options.dataset_config or (preset.hub_config if preset else None)
    try:
        loaded = load_dataset(name, config)
    except Exception as error:  # from "no such name" to "no network", each with a class of its own
        raise DataError(
            f"dataset={options.dataset!r} can't be loaded from the hub: {files.reason(error)} It is no local "
            f"file or folder either. Known names: {BUILTIN}, {', '.join(PRESETS)}."
        ) from error
    if not isinstance(loaded, DatasetDict):
        return {needed: loaded}
    return _chosen(loaded, options, name, needed)


def _chosen(there: Mapping[str, Dataset], options: DataOptions, name: str, needed: str) -> dict[str, Dataset]:
    """Return the splits that the options name, else those with the usual names."""
    asked = {
        "train": options.train_split,
        "validation": options.validation_split,
        "test": options.test_split,
    }
    found: dict[str, Dataset] = {}
    for split, split_name in asked.items():
        if split_name is not None and split_name not in there:
            raise DataError(f"--{split}-split={split_name!r} is not in {name}. Its splits: {', '.join(there)}.")
        candidates = (split_name,) if split_name else folders.SPLIT_ALIASES[split]
        candidate = next((name for name in candidates if name in there), None)
        if candidate is not None:
            found[split] = there[candidate]
    if needed not in found:
        raise DataError(f"{name} has no split {needed!r}. Choose --{needed}-split among {', '.join(there)}.")
    return found


def _columns(options: DataOptions, preset: Preset | None, part: Dataset) -> TextColumns:
    present = files.column_names(part)
    remove_pattern = preset.remove_pattern if preset else None
    if preset is not None:
        known: _Known | None = _Known(preset.prompt_column, preset.completion_column)
    else:
        known = next((one for one in _KNOWN_COLUMNS if {one.prompt, one.completion} <= set(present)), None)
    prompt = options.prompt_column or (known.prompt if known else None)
    completion = options.completion_column or (known.completion if known else None)
    if prompt is None and options.prompt_template is None:
        candidates = (completion,) if completion else chat.COLUMNS
        talk = next((name for name in candidates if name in present and _holds_conversation(part, name)), None)
        if talk is not None:
            return TextColumns(None, talk, remove_pattern=remove_pattern)
    if completion is None or (prompt is None and options.prompt_template is None):
        raise DataError(
            f"dataset={options.dataset!r} has the columns {', '.join(present)}: which are prompt and "
            f"completion can't be told. Name them with --prompt-column or --prompt-template, and --completion-column."
        )
    around = known if known and options.prompt_column is None and options.prompt_template is None else None
    columns = TextColumns(
        prompt,
        completion,
        options.prompt_template,
        remove_pattern,
        before=around.before if around and around.before in present else None,
        after=around.after if around and around.after in present else None,
    )
    missing = [name for name in columns.used if name not in present]
    if missing:
        raise DataError(
            f"dataset={options.dataset!r} has no column {_listed(missing)}. Its columns: {', '.join(present)}."
        )
    return columns


def _holds_conversation(part: Dataset, column: str) -> bool:
    """Return whether the first row that has something in ``column`` has a list of messages there."""
    values = (files.value_of(row[column]) for row in part.select_columns([column]))
    return chat.is_conversation(next((value for value in values if value is not None), None))


def _notes(part: Dataset, columns: TextColumns) -> tuple[str, ...]:
    unused = unused_text(part, columns.used)
    if not unused:
        return ()
    return (
        f"warning: not used, though it holds text: {_listed(unused)}. Write {{{unused[0]}}} into --prompt-template "
        "where it belongs to the prompt.",
    )


def _check_part(name: str, part: Dataset, columns: TextColumns) -> None:
    present = files.column_names(part)
    missing = [column for column in columns.used if column not in present]
    if missing:
        raise DataError(f"The {name} split has no column {_listed(missing)}. Its columns: {', '.join(present)}.")
    if len(part) == 0:
        raise DataError(f"The {name} split is empty. Put at least one example into it.")


def _split(found: dict[str, Dataset], options: DataOptions, columns: TextColumns) -> Splits:
    notes = _notes(found["train"], columns)
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
                f"train rows would leave none to train on. Ask for fewer."
            )
    if options.train_rows is not None:
        train = train.select(range(min(options.train_rows, len(train))))
    return Splits(train, parts["validation"], parts["test"], columns, notes)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
