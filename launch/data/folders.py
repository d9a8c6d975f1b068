"""Which files of a folder belong to which split: folders of split files, hub clones, and what save_to_disk wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset_builder, load_from_disk

from ds_agsel.errors import DataError

from . import files

SPLIT_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_SHARD = re.compile(r"(?P<split>\w+?)-\d+-of-\d+")  # train-00000-of-00002


def read(folder: Path, needed: str, config: str | None) -> dict[str, Dataset]:
    """Return the splits in ``folder`` by the names that they have there.

    A folder that ``save_to_disk`` wrote, one with a file for each split (``train.jsonl``), or a clone of a hub data
    set: shards such as ``data/train-00000-of-00001.parquet``, or the files that its README's ``configs`` name, of
    which ``config`` chooses. Raise DataError if there is no file for ``needed``.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(folder, needed)
    found: Mapping[str, Sequence[Path]] = {} if config else _split_files(folder)
    if needed not in found:
        found = {**found, **_configured_files(folder, config)}
    if not any(alias in found for alias in SPLIT_ALIASES[needed]):
        there = sorted(path.name for path in folder.iterdir() if path.suffix in files.SUFFIXES)
        raise DataError(
            f"{folder} has no {needed} file; it holds {', '.join(map(repr, there)) or 'no data file'}. "
            f"Name one {', '.join(f'{needed}{suffix}' for suffix in files.SUFFIXES)}, or give the file itself."
        )
    return {split: files.read(paths) for split, paths in found.items()}


def _saved(folder: Path, needed: str) -> dict[str, Dataset]:
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # damaged folders fail in many ways
        raise DataError(f"{folder} can't be read as a save_to_disk folder: {files.reason(error)}") from error
    if isinstance(loaded, DatasetDict):
        return dict(loaded)
    return {needed: loaded}


def _split_files(folder: Path) -> Mapping[str, Sequence[Path]]:
    """Return the files named for a split, or its shards, in ``folder`` or else in its folder ``data``."""
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        there = sorted(path for path in place.iterdir() if path.suffix in files.SUFFIXES) if place.is_dir() else []
        for split, aliases in SPLIT_ALIASES.items():
            named = [path for path in there if path.stem in aliases]
            shards = [path for path in there if (match := _SHARD.fullmatch(path.stem)) and match["split"] in aliases]
            if len(named) > 1 or (named and shards):
                names = ", ".join(repr(path.name) for path in [*named, *shards])
                raise DataError(f"{place} has more than one {split} file: {names}. Keep one of them.")
            if named or shards:
                found[split] = named or shards
        if found:
            return found
    return {}


def _configured_files(folder: Path, config: str | None) -> dict[str, Sequence[Path]]:
    """Return the files of each split that the ``configs`` of a hub clone's README name."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        if "configs:" not in readme.read_text(encoding="utf-8", errors="replace"):
            return {}
        data_files = load_dataset_builder(str(folder), config).config.data_files or {}
    except Exception as error:  # no such config, no such file, several of them and none chosen
        raise DataError(f"{folder}: the configs of its README can't be used: {files.reason(error)}") from error
    return {str(split): [Path(str(path)) for path in paths] for split, paths in data_files.items()}
