"""Data files of any kind of damage: they work, or one clear DataError says what is wrong and where."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_support import CHATML, byte_tokenizer, encoder, load
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ds_agsel.errors import DataError
from launch.data import encoding, files

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TOKENIZER = byte_tokenizer(CHATML)
TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)  # lone surrogates too
WORDS = st.sampled_from(["a", "b c", "0123", "<think>x</think>y", "[end]", "\n", "é"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "human", "gpt", "judge", ""]),
            "content": WORDS | VALUES,
        }
    ),
    max_size=4,
)
ROWS = st.lists(
    st.fixed_dictionaries({"question": TEXT | VALUES, "answer": WORDS | VALUES}, optional={"context": TEXT | VALUES})
    | st.fixed_dictionaries({"question": WORDS, "answer": WORDS | st.integers() | st.floats()})
    | st.fixed_dictionaries({"messages": MESSAGES})
    | VALUES,
    max_size=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the files; what datasets makes of them goes there too, and not into the user's cache."""
    place = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        yield place


def works_or_says_why(file: Path) -> None:
    """Load and encode ``file``; a DataError of one line is as good."""
    with contextlib.suppress(DataError) as _:
        try:
            splits = load(str(file), validation_rows=0, test_rows=0)
            chat = encoder(TOKENIZER, columns=splits.columns, max_tokens=4000, use_chat_template=True)
            encoded = encoding.encode("train", splits.train, chat, workers=1, drop_long_prompts=False)
        except DataError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
            raise
        for row in encoded.rows:
            text = TOKENIZER.decode(row["input_ids"][row["prompt_numel"] :])
            assert "".join(row["completion"].split()) in "".join(text.split())


@QUICK
@given(ROWS, st.sampled_from(["lines", "array", "object"]))
def test_any_json_works_or_is_named(folder: Path, rows: list[Any], form: str) -> None:
    file = folder / ("a.jsonl" if form == "lines" else "a.json")
    whole = {"lines": "\n".join(map(json.dumps, rows)), "array": json.dumps(rows, indent=1)}
    file.write_text(whole.get(form, json.dumps({"data": rows}, indent=1)))
    works_or_says_why(file)


@QUICK
@given(st.binary(max_size=60), st.sampled_from(sorted(files.SUFFIXES)))
@example(b"question,answer\na,\r1\n", ".csv")
@example(b"\xff\xfe", ".jsonl")
@example(b"{", ".json")
@example(b"[", ".json")
@example(b"[]x", ".json")
def test_any_bytes_work_or_are_named(folder: Path, content: bytes, suffix: str) -> None:
    file = folder / f"b{suffix}"
    file.write_bytes(content)
    works_or_says_why(file)


@QUICK
@given(st.integers(0, 200), st.binary(min_size=1, max_size=3), st.sampled_from([".json", ".jsonl", ".csv"]))
def test_a_good_file_with_some_bytes_changed_works_or_is_named(
    folder: Path, position: int, change: bytes, suffix: str
) -> None:
    good = {
        ".csv": 'question,answer\n"a, b",1\nc,"2\n3"\n',
        ".jsonl": '{"question": "a", "answer": 1}\n{"question": "b", "answer": "é"}\n',
        ".json": '[\n{"question": "a", "answer": 1},\n{"question": "b", "answer": "é"}\n]\n',
    }[suffix].encode()
    file = folder / f"c{suffix}"
    file.write_bytes(good[:position] + change + good[position + len(change) :])
    works_or_says_why(file)
