"""Read json, jsonl, csv and parquet files. Every value stays the text that the file has.

A json or csv file becomes a `datasets.Dataset` whose columns are strings, with no type inference: ``0123`` stays
``0123``, ``7`` stays ``7``, a date stays a date. A list or an object inside a row is kept as JSON behind `_MARK`;
`value_of` gives it back.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, load_dataset

from ds_agsel.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
PLACE = "__place__"  # column that says where a row was read; never a column of the data
_FORMAT_VERSION = 1  # part of the cache's key: raise it when a row that is read changes
_MARK = "\x1e"  # ASCII's record separator: what follows it in a cell is JSON
_BYTE_ORDER_MARKS = {  # UTF-32's begins with UTF-16's, so it comes first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
_SPACE = re.compile(r"\s*")

Row = tuple[str, dict[str, Any]]  # where in the file it is, such as "line 6", and its columns


def read(files: Sequence[Path]) -> Dataset:
    """Return the rows of ``files``, all of one kind, one file after the other.

    Rows of json and csv files have the column `PLACE`, such as "line 6 of train.jsonl". Raise DataError, with file
    and line, for a file that is not there, empty, malformed or not UTF-8.
    """
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        names = ", ".join(repr(file.name) for file in files)
        raise DataError(f"{names} are files of several kinds. Keep those of one kind.")
    suffix = suffixes.pop()
    if suffix not in SUFFIXES:
        raise DataError(f"{files[0]} is of an unknown kind. Use one of {', '.join(SUFFIXES)}.")
    for file in files:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file} can't be read: {error.strerror}. Give a file that can be.") from None
        if size == 0:
            raise _empty(file)
    return _read_parquet(files) if suffix == ".parquet" else _read_text(files)


def numbered(part: Dataset) -> Dataset:
    """Return ``part`` with the column `PLACE`, which is each row's number, from 1, where it has none yet."""
    if PLACE in part.column_names:
        return part
    return part.add_column(PLACE, np.arange(1, len(part) + 1))


def column_names(part: Dataset) -> list[str]:
    """Return the columns of the data itself."""
    return [name for name in part.column_names if name != PLACE]


def value_of(cell: Any) -> Any:
    """Return a cell's value: a list or an object that the file has, else the cell itself."""
    if not isinstance(cell, str) or not cell.startswith(_MARK):
        return cell
    try:
        return json.loads(cell[len(_MARK) :])
    except ValueError:  # text of a parquet file that happens to begin so
        return cell


def _read_parquet(files: Sequence[Path]) -> Dataset:
    try:
        part = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # datasets wraps its readers' errors in many classes of its own
        raise DataError(f"{files[0]} can't be read: {reason(error)}") from error
    if len(part) == 0:
        raise _empty(files[0])
    return part


def _read_text(files: Sequence[Path]) -> Dataset:
    columns: dict[str, None] = {}
    for file in files:
        count = 0
        for _, row in _checked_rows(file):
            columns.update(dict.fromkeys(row))
            count += 1
        if count == 0:
            raise _empty(file)
    stamps = tuple((str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    names = tuple(columns)
    try:
        return Dataset.from_generator(
            _cells,
            features=Features({name: Value("string") for name in (*names, PLACE)}),
            gen_kwargs={"stamps": stamps, "names": names, "version": _FORMAT_VERSION},
        )
    except Exception as error:  # every row was read once: what is left is the cache folder's disk
        raise DataError(f"{files[0]} can't be copied into the cache of datasets: {reason(error)}") from error


def _cells(
    stamps: tuple[tuple[str, int, int], ...], names: tuple[str, ...], version: int
) -> Iterator[dict[str, str | None]]:
    for path, _, _ in stamps:
        file = Path(path)
        for place, row in _rows(file):
            yield {**{name: _cell_of(row.get(name)) for name in names}, PLACE: f"{place} of {file.name}"}


def _cell_of(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not value.startswith(_MARK):
        return value
    return _MARK + json.dumps(value, ensure_ascii=False)


def _checked_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of ``file``. Raise DataError, with the line, for a row that can't be read or kept."""
    place = "line 1"
    rows = _rows(file)
    while True:
        try:
            place, row = next(rows)
            for name, value in row.items():
                (_cell_of(value) or "").encode()
                name.encode()
        except StopIteration:
            return
        except RecursionError:
            raise _problem(file, f"after {place} there is JSON that is nested too deep. Remove it.") from None
        except UnicodeEncodeError:
            raise _problem(file, f"{place} has half a character (a lone surrogate, \\ud800 to \\udfff).") from None
        except OSError as error:
            raise _problem(file, f"{error.strerror}.") from None
        yield place, row


def _rows(file: Path) -> Iterator[Row]:
    if file.suffix == ".csv":
        yield from _csv_rows(file)
        return
    first = next((line for line in _lines(file) if line.strip()), "").lstrip()
    if first.startswith("["):
        yield from _json_array(file)
    elif file.suffix == ".json" and first and not _is_json(first):
        yield from _json_object(file)
    else:
        yield from _json_lines(file)


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of ``file``, each with its end. Raise DataError for one that is not UTF-8."""
    with open(file, "rb") as raw_lines:
        for number, raw in enumerate(raw_lines, start=1):
            if number == 1:
                for mark, encoding in _BYTE_ORDER_MARKS.items():
                    if raw.startswith(mark):
                        raise _problem(file, f"line 1: this is {encoding}. Save the file as UTF-8.")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if b"\0" in raw:
                raise _problem(file, f"line {number} has a zero byte, as UTF-16 has. Save the file as UTF-8.")
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _problem(
                    file,
                    f"line {number} is not UTF-8 (byte 0x{raw[error.start]:02x} after {error.start} bytes). "
                    "Save the file as UTF-8.",
                ) from None


def _json_lines(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise _problem(
                file, f"line {number} is no valid JSON ({error.msg}, column {error.colno}). Mend it."
            ) from None
        except RecursionError:
            raise _problem(file, f"line {number} has JSON that is nested too deep. Remove it.") from None
        yield f"line {number}", _object(file, number, value)


def _json_array(file: Path) -> Iterator[Row]:
    text = "".join(_lines(file))
    position = _SPACE.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(file, text, position, line)
        yield f"line {line}", _object(file, line, value)
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        separator = text[position : position + 1]
        line, counted = line + text.count("\n", counted, position), position
        closed = separator == "]"
        if separator not in (",", "]") or (separator == "," and _next_is(text, position + 1, "]")):
            what = "a comma before ']'" if separator == "," else f"{separator!r}" if separator else "the end"
            raise _problem(file, f"line {line} is no valid JSON ({what} where ',' or ']' belongs). Mend it.")
        if not closed:
            position = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
    if text[position + 1 :].strip():
        raise _problem(file, f"line {line}: there is more after the list. Remove it.")


def _json_object(file: Path) -> Iterator[Row]:
    """Yield the rows of a file that is one object: those of its one list of objects, else the object itself."""
    text = "".join(_lines(file))
    start = _SPACE.match(text).end()  # type: ignore[union-attr]
    value, end = _decode(file, text, start, 1 + text.count("\n", 0, start))
    if text[end:].strip():
        line = 1 + text.count("\n", 0, _SPACE.match(text, end).end())  # type: ignore[union-attr]
        raise _problem(file, f"line {line}: there is more after the object. Write a list of objects, or one a line.")
    row = _object(file, 1, value)
    lists = [item for item in row.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) != 1:
        yield "line 1", row
        return
    for number, item in enumerate(lists[0], start=1):
        if not isinstance(item, dict):
            raise _problem(file, f"row {number} is {type(item).__name__}, not an object with columns. Mend it.")
        yield f"row {number}", item


def _csv_rows(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(file), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _problem(file, f"the row that begins on line {line}: {error}. Mend it.") from None
        if not fields:
            continue
        if not header:
            header = [name or f"column {number}" for number, name in enumerate(fields, start=1)]
            repeated = [name for name in header if header.count(name) > 1]
            if repeated:
                raise _problem(file, f"line {line} names the column {repeated[0]!r} twice. Rename one.")
            continue
        if len(fields) > len(header):
            raise _problem(file, f"Expected {len(header)} fields in line {line}, saw {len(fields)}.")
        yield f"line {line}", dict(itertools.zip_longest(header, fields))


def _decode(file: Path, text: str, position: int, line: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _problem(
            file, f"line {error.lineno} is no valid JSON ({error.msg}, column {error.colno}). Mend it."
        ) from None
    except RecursionError:
        raise _problem(file, f"line {line} has JSON that is nested too deep. Remove it.") from None


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _next_is(text: str, position: int, character: str) -> bool:
    return text.startswith(character, _SPACE.match(text, position).end())  # type: ignore[union-attr]


def _object(file: Path, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _problem(file, f"line {line} is {type(value).__name__}, not an object with columns. Mend or remove it.")
    return value


def _problem(file: Path, what: str) -> DataError:
    return DataError(f"{file} can't be read: {what}")


def _empty(file: Path) -> DataError:
    return DataError(f"{file} is empty. Put at least one example into it.")


def reason(error: BaseException) -> str:
    """Return the first line of the innermost error: it says what happened, the outer ones only that it did."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".") + "."
