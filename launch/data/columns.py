"""Which columns of a row are prompt and completion, and the text that they hold."""

from __future__ import annotations

import datetime
import decimal
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ds_agsel.errors import ConfigError

from . import chat, files
from .chat import Example, UnusableRow

_ROWS_LOOKED_AT = 100  # of a split, for columns that hold text and are not used
_KINDS: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}


@dataclass(frozen=True)
class TextColumns:
    """Where a row's prompt and completion are. Picklable: tokenisation workers get it.

    Attributes:
        prompt: column of the prompt; None if ``template`` makes it, or ``completion`` holds whole conversations.
        completion: column of the completion, or of the conversation.
        template: text with columns in braces, which is the prompt.
        remove_pattern: regular expression of the text to remove from completions.
        before, after: columns put before and after the prompt, on lines of their own; empty ones are left out.
    """

    prompt: str | None
    completion: str
    template: str | None = None
    remove_pattern: str | None = None
    before: str | None = None
    after: str | None = None

    def examples_of(self, row: Mapping[str, Any]) -> list[Example]:
        """Return the examples of ``row``: one, or one for each assistant's turn. Raise UnusableRow."""
        completion = files.value_of(row[self.completion])
        talk = chat.is_conversation(completion)
        if self.prompt is None and self.template is None:
            return self._cleaned(chat.examples_in([], chat.turns_of(completion, self.completion), self.completion))
        before = self._turns_before(row)
        text = "" if talk else self._text_in(row, self.completion)
        if not talk and not text.strip():
            raise _empty(self.completion)
        after = chat.turns_of(completion, self.completion) if talk else [chat.assistant_turn(text)]
        return self._cleaned(chat.examples_in(before, after, self.completion))

    def last_example_of(self, row: Mapping[str, Any]) -> Example:
        """Return the example of the row's last answer. Raise UnusableRow."""
        return self.examples_of(row)[-1]

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """Return the row's last prompt as one text. Raise UnusableRow."""
        return self.last_example_of(row).prompt

    def completion_of(self, row: Mapping[str, Any]) -> str:
        """Return the row's last completion, without what the preset removes. Raise UnusableRow."""
        return self.last_example_of(row).completion

    @property
    def used(self) -> tuple[str, ...]:
        """Every column that is read."""
        prompts = (self.before, self.prompt, self.after) if self.template is None else template_columns(self.template)
        return tuple(dict.fromkeys([*(name for name in prompts if name), self.completion]))

    def _turns_before(self, row: Mapping[str, Any]) -> list[chat.Turn]:
        if self.template is not None:
            texts = {name: self._text_in(row, name) for name in template_columns(self.template)}
            if not any(text.strip() for text in texts.values()):
                raise _empty(next(iter(texts)))
            return [chat.user_turn(self.template.format_map(texts))]
        name = str(self.prompt)
        prompt = files.value_of(row[name])
        if chat.is_conversation(prompt):
            return chat.turns_of(prompt, name)
        text = self._text_in(row, name)
        if not text.strip():
            raise _empty(name)
        around = [self._text_in(row, column) if column else "" for column in (self.before, self.after)]
        return [chat.user_turn("\n".join(part for part in (around[0], text, around[1]) if part.strip()))]

    def _text_in(self, row: Mapping[str, Any], column: str) -> str:
        try:
            return _text_of(files.value_of(row[column]))
        except TypeError as error:
            remedy = " or leave it out with --prompt-column" if column in (self.before, self.after) else ""
            raise UnusableRow(f"its column {column!r} holds {error}, not text. Write it as text{remedy}") from None

    def _cleaned(self, examples: list[Example]) -> list[Example]:
        if self.remove_pattern is None:
            return examples
        return [Example(one.turns, re.sub(self.remove_pattern, "", one.completion)) for one in examples]


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a prompt template such as ``"Question: {question}"`` names. Raise ConfigError."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ConfigError(
            f"--prompt-template={template!r}: {error}. Name columns in braces, write {{{{ for a brace."
        ) from None
    names = [str(name) for _, name, _, _ in fields]
    if not names or not all(name.isidentifier() for name in names) or any(spec or kind for _, _, spec, kind in fields):
        raise ConfigError(
            f"--prompt-template={template!r} must name columns in braces, such as {{question}}, and "
            f"nothing else in them."
        )
    return tuple(dict.fromkeys(names))


def unused_text(part: Dataset, used: Sequence[str]) -> list[str]:
    """Return the columns of ``part`` that hold text in its first rows and are not in ``used``."""
    features = part.features or {}
    names = [name for name in files.column_names(part) if name not in used and "string" in str(features[name])]
    if not names:
        return []
    rows = part.select(range(min(_ROWS_LOOKED_AT, len(part)))).select_columns(names)
    return [name for name in names if any(_has_letters(files.value_of(cell)) for cell in rows[name])]


def _has_letters(value: Any) -> bool:
    return any(character.isalpha() for text in _strings_in(value) for character in text)


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings_in(inner)


def _text_of(value: Any) -> str:
    """Return a value as text, None as "". Raise TypeError, with its kind, for any other value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(value)
    raise TypeError(_KINDS.get(type(value), type(value).__name__))


def _empty(column: str) -> UnusableRow:
    return UnusableRow(f"its column {column!r} is empty. Fill or remove it")
