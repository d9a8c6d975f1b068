"""Columns of text: what belongs to the prompt is in it, and what is not used is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import byte_tokenizer, encoder, learnt, load, write_rows

from ds_agsel.errors import DataError

ALPACA = [{"instruction": "Name it.", "input": "horse", "output": "mammal"}] * 3
DOLLY = [{"instruction": "Who?", "context": "Ann is 3.", "response": "Ann", "category": "qa"}] * 3
SQUAD = [{"context": "Ann is 3.", "question": "Who?", "answer": "Ann"}] * 3


@pytest.mark.parametrize(
    ("rows", "prompt"),
    [(ALPACA, "Name it.\nhorse\n"), (DOLLY, "Who?\nAnn is 3.\n"), (SQUAD, "Ann is 3.\nWho?\n")],
)
def test_the_input_or_context_is_in_the_prompt(tmp_path: Path, rows: list[dict[str, Any]], prompt: str) -> None:
    assert learnt(write_rows(tmp_path / "a.jsonl", rows))[0][0] == prompt


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_input_is_left_out(tmp_path: Path, empty: str | None) -> None:
    rows = [{**ALPACA[0], "input": value} for value in ("horse", empty)]
    dataset = write_rows(tmp_path / "a.jsonl", rows)
    assert [prompt for prompt, _ in learnt(dataset)] == ["Name it.\nhorse\n", "Name it.\n"]
    with_template = learnt(dataset, prompt_template="{instruction}|{input}")
    assert [prompt.strip() for prompt, _ in with_template] == ["Name it.|horse", "Name it.|"]


def test_a_template_with_nothing_but_empty_columns_is_refused(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "a.jsonl", [ALPACA[0], {**ALPACA[0], "instruction": "", "input": None}])
    with pytest.raises(DataError, match=r"Line 2 of a\.jsonl can't be used: its column 'instruction' is empty"):
        learnt(dataset, prompt_template="{instruction}{input}")


def test_columns_of_text_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    rows = [{"id": "17", "question": "a", "answer": "1", "hint": "none", "choices": ["x"], "level": 3}] * 9
    [note] = load(write_rows(tmp_path / "a.jsonl", rows)).notes
    assert note.startswith("warning: not used, though it holds text: 'hint', 'choices'. Write {hint} into")
    assert load(write_rows(tmp_path / "b.jsonl", ALPACA * 3)).notes == ()
    [note] = load(write_rows(tmp_path / "b.jsonl", ALPACA * 3), prompt_column="instruction").notes
    assert "'input'" in note


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("answer", ["Ann", "Bob"], "a list"),
        ("answer", {"text": ["Ann"], "answer_start": [3]}, "an object"),
        ("answer", [], "a list"),
        ("question", {"text": "Who?"}, "an object"),
        ("context", [["Ann", ["is 3."]]], "a list"),
    ],
)
def test_lists_and_objects_are_refused_by_column_and_line(tmp_path: Path, column: str, value: Any, kind: str) -> None:
    dataset = write_rows(tmp_path / "a.jsonl", [SQUAD[0], {**SQUAD[0], column: value}])
    message = rf"^Line 2 of a\.jsonl can't be used: its column '{column}' holds {kind}, not text\. Write it as text"
    with pytest.raises(DataError, match=message):
        learnt(dataset)


def test_lists_of_a_parquet_file_are_refused_too(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"question": "Who?", "answer": {"text": ["Ann"]}}] * 3).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^Row 1 of the train split .* its column 'answer' holds an object, not text"):
        learnt(str(tmp_path / "a.parquet"))


def test_columns_of_text_alone_are_enough_for_an_encoder() -> None:
    encoded = encoder(byte_tokenizer())({"question": ["a", ""], "answer": ["1", "2"]})
    assert encoded["completion"] == ["1", ""] and encoded["problem"][1].startswith("its column 'question' is empty")
