"""Conversations in data: ``messages`` as chat templates take them, and ShareGPT's ``conversations``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ("messages", "conversations", "conversation")  # that hold whole conversations, by custom
_ROLES = {
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
# Fields of a message that affect its text or whether it is learnt, and that are not supported here.
_NOT_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "weight", "train", "loss")

Turn = dict[str, str]  # "role" and "content"


class UnusableRow(ValueError):
    """A row that can't become an example; the text gives the reason and the remedy."""


@dataclass(frozen=True)
class Example:
    """An answer, and the turns of conversation before it."""

    turns: tuple[Turn, ...]
    completion: str

    @property
    def prompt(self) -> str:
        """Return the turns as one text: a single user turn as its content, else each turn after its role."""
        if [turn["role"] for turn in self.turns] == ["user"]:
            return self.turns[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns)


def user_turn(text: str) -> Turn:
    """Return ``text`` as a user's turn."""
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> Turn:
    """Return ``text`` as an assistant's turn."""
    return {"role": "assistant", "content": text}


def is_conversation(value: Any) -> bool:
    """Return whether ``value`` looks like a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def turns_of(value: Any, column: str) -> list[Turn]:
    """Return the turns of a list of messages. Raise UnusableRow for any other value."""
    if not is_conversation(value):
        raise UnusableRow(f"its column {column!r} is no list of messages. Mend or remove it")
    return [_turn_of(message, f"message {number} of its column {column!r}") for number, message in enumerate(value, 1)]


def examples_in(before: Sequence[Turn], after: Sequence[Turn], column: str) -> list[Example]:
    """Return an example for each assistant's turn of ``after``, with all turns before it. Raise UnusableRow."""
    turns = [*before, *after]
    answers = [index for index in range(len(before), len(turns)) if turns[index]["role"] == "assistant"]
    if not answers:
        raise UnusableRow(f"its column {column!r} has no turn of an assistant to learn. Mend or remove it")
    if answers[0] == 0 or not any(turn["role"] == "user" for turn in turns[: answers[0]]):
        raise UnusableRow(f"its column {column!r} has an assistant's turn before any user's. Mend or remove it")
    for index in answers:
        if not turns[index]["content"].strip():
            raise UnusableRow(f"an assistant's turn in its column {column!r} is empty. Fill or remove it")
    return [Example(tuple(turns[:index]), turns[index]["content"]) for index in answers]


def _turn_of(message: Mapping[str, Any], where: str) -> Turn:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise UnusableRow(f"{where} has the role {role!r}. Use one of {', '.join(_ROLES)}")
    used = [name for name in _NOT_READ if message.get(name) not in (None, "", [], {})]
    if used:
        raise UnusableRow(f"{where} has {used[0]!r}, which is not read here. Write it into the content, or remove it")
    if isinstance(content, list):
        content = "".join(_part_of(part, where) for part in content)
    if not isinstance(content, str):
        raise UnusableRow(f"{where} has no text as its content. Mend or remove it")
    return {"role": _ROLES[role.lower()], "content": content}


def _part_of(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UnusableRow(f"{where} has a part that is no text. Only text is learnt here; remove it")
