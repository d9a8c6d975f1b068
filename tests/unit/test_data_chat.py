"""Conversations: read in each form that they come in, every answer learnt once, and by the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import CHATML, byte_tokenizer, encoder, learnt, load, write_rows

from ds_agsel.errors import DataError
from launch.data import encoding


def messages(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def sharegpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ONE = [("[user]Hi[end][assistant]", "Hello[end]")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages("Hi", "Hello")},
        {"conversations": sharegpt("Hi", "Hello")},
        {"prompt": messages("Hi"), "completion": [{"role": "assistant", "content": "Hello"}]},
        {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}]},
        {"prompt": messages("Hi"), "completion": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {
            "messages": [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages("Hi", "Hello")
            ]
        },
    ],
)
def test_each_form_of_a_conversation_gives_the_same_tokens(tmp_path: Path, row: dict[str, Any]) -> None:
    from datasets import Dataset

    assert learnt(write_rows(tmp_path / "a.jsonl", [row] * 2), CHATML) == ONE * 2
    Dataset.from_list([row] * 2).to_parquet(tmp_path / "a.parquet")
    assert learnt(str(tmp_path / "a.parquet"), CHATML) == ONE * 2


def test_every_answer_of_a_conversation_is_learnt_after_what_came_before_it(tmp_path: Path) -> None:
    row = {"messages": messages("a", "b", "c", "d", system="s")}
    first = "[system]s[end][user]a[end][assistant]"
    assert learnt(write_rows(tmp_path / "a.jsonl", [row]), CHATML) == [
        (first, "b[end]"),
        (f"{first}b[end][user]c[end][assistant]", "d[end]"),
    ]


def test_a_test_problem_is_the_last_answer(tmp_path: Path) -> None:
    splits = load(write_rows(tmp_path / "a.jsonl", [{"messages": messages("a", "b", "c", "d")}] * 6))
    chat = encoder(byte_tokenizer(CHATML), columns=splits.columns, use_chat_template=True, every_answer=False)
    encoded = encoding.encode("test", splits.test, chat, workers=1, drop_long_prompts=False)
    assert [(row["prompt"], row["completion"]) for row in encoded.rows] == [("user: a\nassistant: b\nuser: c", "d")] * 3


def test_a_column_of_conversations_can_be_named(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "a.jsonl", [{"dialog": messages("Hi", "Hello")}] * 2)
    assert learnt(dataset, CHATML, completion_column="dialog") == ONE * 2


def test_one_question_and_answer_need_no_chat_template_but_more_do(tmp_path: Path) -> None:
    assert learnt(write_rows(tmp_path / "a.jsonl", [{"messages": messages("Hi", "Hello")}])) == [("Hi\n", "Hello[end]")]
    with pytest.raises(DataError, match=r"^Line 1 of b\.jsonl .* only a chat template can write"):
        learnt(write_rows(tmp_path / "b.jsonl", [{"messages": messages("Hi", "Hello", system="s")}]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (messages("Hi"), "has no turn of an assistant to learn"),
        (messages("Hi", " "), "an assistant's turn in its column 'messages' is empty"),
        (messages("Hi", "Hello")[1:], "has an assistant's turn before any user's"),
        ([{"role": "judge", "content": "x"}], "message 1 of its column 'messages' has the role 'judge'. Use one of"),
        ([{"role": "user"}], "message 1 of its column 'messages' has no text as its content"),
        ([*messages("Hi"), {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "has 'tool_calls'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a part that is no text"),
        ("text", "its column 'messages' is no list of messages"),
        ([], "its column 'messages' is no list of messages"),
        (None, "its column 'messages' is no list of messages"),
    ],
)
def test_a_conversation_that_can_not_be_learnt_is_named_with_its_line(tmp_path: Path, value: Any, message: str) -> None:
    dataset = write_rows(tmp_path / "a.jsonl", [{"messages": messages("Hi", "Hello")}, {"messages": value}])
    with pytest.raises(DataError) as caught:
        learnt(dataset, CHATML)
    assert str(caught.value).startswith("Line 2 of a.jsonl can't be used: ") and message in str(caught.value)
