"""Text to tokens: chat template, loss on the completion only, truncation that is counted."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ds_agsel.errors import DataError

from . import files
from .chat import Example, Turn, UnusableRow, user_turn
from .columns import TextColumns
from .templates import ChatTemplate

_FORMAT_VERSION = 2  # part of the cache's key: raise it when an encoded row changes
_ROWS_PER_WORKER = 1000  # with fewer rows a process costs more to start than it saves


def wants_chat_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether ``choice``, one of CHAT_TEMPLATE_CHOICES, means a chat template for this tokenizer."""
    return choice == "always" or (choice == "auto" and tokenizer.chat_template is not None)


@dataclass(frozen=True)
class Encoder:
    """Rows of text to rows of tokens. Picklable: tokenisation workers get it.

    Attributes:
        use_chat_template: render a prompt as a user's turn and a completion as the assistant's.
        system: text of the system turn of rows without one; None leaves it to the template.
        max_tokens: longest row; a completion is cut there, a prompt must be shorter.
        every_answer: of a conversation make a row of tokens for each of the assistant's turns, not for the last alone.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: TextColumns
    max_tokens: int
    use_chat_template: bool
    system: str | None = None
    every_answer: bool = True

    def __post_init__(self) -> None:
        if self.use_chat_template:
            _ = self._template  # raises an error in it now, not in a worker

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Tokenise columns of text.

        Returns ``input_ids``, ``prompt_numel``, ``cut_numel``, ``prompt``, ``completion`` and ``problem``.

        A row of a conversation can become several. ``problem`` says why a row can't be used, "" where it can: an
        error raised here would be lost in a worker.
        """
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        encoded: dict[str, list[Any]] = {name: [] for name in (*_unusable(""), files.PLACE)}
        for row in rows:
            for values in self._encode(row):
                for name, value in {**values, files.PLACE: row.get(files.PLACE)}.items():
                    encoded[name].append(value)
        return encoded

    def _encode(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            examples = self.columns.examples_of(row)
            return [self._encode_example(example) for example in (examples if self.every_answer else examples[-1:])]
        except UnusableRow as problem:
            return [_unusable(str(problem))]

    def _encode_example(self, example: Example) -> dict[str, Any]:
        prompt, completion = self.render(example.turns, example.completion)
        prompt_ids = self._ids_of(prompt)
        completion_ids = self.tokenizer(completion, add_special_tokens=False).input_ids
        if len(prompt_ids) >= self.max_tokens:
            return _unusable(
                f"its prompt has {len(prompt_ids)} tokens and --sequence-length={self.max_tokens} leaves "
                f"no room for a completion. Use a larger one, or --long-prompts=drop"
            )
        ids = prompt_ids + completion_ids
        return {
            "input_ids": ids[: self.max_tokens],
            "prompt_numel": len(prompt_ids),
            "cut_numel": max(0, len(ids) - self.max_tokens),
            "prompt": example.prompt,
            "completion": example.completion,
            "problem": "",
        }

    def render(self, prompt: str | Sequence[Turn], completion: str) -> tuple[str, str]:
        """Return the texts as the model sees them; the completion ends in end-of-text. Raises UnusableRow."""
        turns = [user_turn(prompt)] if isinstance(prompt, str) else list(prompt)
        if self.use_chat_template:
            return self._template.render(turns, completion)
        return self._opened(turns), f"{completion}{self.tokenizer.eos_token}"

    def prompt(self, prompt: str | Sequence[Turn]) -> tuple[str, list[int]]:
        """Return a prompt as the model sees it, and its tokens. Raises UnusableRow."""
        opened = self._opened([user_turn(prompt)] if isinstance(prompt, str) else list(prompt))
        return opened, self._ids_of(opened)

    def _opened(self, turns: Sequence[Turn]) -> str:
        if self.use_chat_template:
            return self._template.opened(turns)
        if [turn["role"] for turn in turns] != ["user"]:
            raise UnusableRow(
                f"it is a conversation of {len(turns) + 1} turns, which only a chat template can write. Use a model "
                "with one, and no --chat-template=never"
            )
        return f"{turns[0]['content']}\n"

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.system)

    def _ids_of(self, prompt: str) -> list[int]:
        # A chat template writes the special tokens itself; without one the tokenizer adds them, the last of
        # which may be an end of text that does not belong before a completion.
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=not self.use_chat_template).input_ids
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    @property
    def _vocabulary(self) -> Any:
        """The tokenizer's vocabulary and rules, without the padding and truncation that its last call left."""
        if not self.tokenizer.is_fast:
            return sorted(self.tokenizer.get_vocab().items())
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return {name: value for name, value in state.items() if name not in ("padding", "truncation")}

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the tokens; tokenizers themselves have no stable hash."""
        parts = (
            _FORMAT_VERSION,
            self._vocabulary,
            self.tokenizer.eos_token,  # which ends a completion, and is no part of the vocabulary's state
            self.tokenizer.chat_template,
            self.columns,
            self.max_tokens,
            self.use_chat_template,
            self.system,
            self.every_answer,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Encoded:
    """A tokenised split.

    Attributes:
        rows: columns ``input_ids`` and ``prompt_numel``, with the texts ``prompt`` and ``completion`` beside them.
        lengths: tokens of each row, int64, (num_rows,).
        label_numel: tokens of each row that the loss is on, int64, (num_rows,).
        cut_rows: rows whose completion was cut; cut_numel: tokens lost that way; dropped_rows: rows left out.
    """

    rows: Dataset
    lengths: np.ndarray
    label_numel: np.ndarray
    cut_rows: int
    cut_numel: int
    dropped_rows: int


def encode(split: str, part: Dataset, encoder: Encoder, *, workers: int, drop_long_prompts: bool) -> Encoded:
    """``part`` tokenised by up to ``workers`` processes, or from the cache where it was before.

    Raises DataError for the first row that can't be used; with ``drop_long_prompts`` those with too long a
    prompt are left out and counted.
    """
    if len(part) == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return Encoded(part, nothing, nothing, cut_rows=0, cut_numel=0, dropped_rows=0)
    part = files.numbered(part).select_columns([*encoder.columns.used, files.PLACE])
    processes = min(workers, len(part) // _ROWS_PER_WORKER)
    rows = part.map(
        encoder,
        batched=True,
        remove_columns=part.column_names,
        num_proc=processes if processes > 1 else None,
        new_fingerprint=hashlib.sha256(f"{part._fingerprint}{encoder.fingerprint}".encode()).hexdigest()[:32],
        desc=f"tokenising {split}",
    )
    problems = np.asarray(rows["problem"], dtype=object)
    usable = np.flatnonzero(problems == "")
    for index in np.flatnonzero(problems != ""):
        if not (drop_long_prompts and "--long-prompts" in problems[index]):
            raise DataError(f"{_where(rows[int(index)][files.PLACE], split)} can't be used: {problems[index]}.")
    if len(usable) < len(problems):
        rows = rows.select(usable)
    if len(rows) == 0:
        raise DataError(f"No row of the {split} split is left: every prompt is longer than the sequence length.")
    lengths = np.asarray([len(ids) for ids in rows["input_ids"]], dtype=np.int64)
    cut = np.asarray(rows["cut_numel"], dtype=np.int64)
    return Encoded(
        rows=rows,
        lengths=lengths,
        label_numel=lengths - np.asarray(rows["prompt_numel"], dtype=np.int64),
        cut_rows=int(np.count_nonzero(cut)),
        cut_numel=int(cut.sum()),
        dropped_rows=len(problems) - len(usable),
    )


def _where(place: int | str, split: str) -> str:
    """Return a row's place to begin a sentence with: a file's line, else the row's number in its split."""
    return place[:1].upper() + place[1:] if isinstance(place, str) else f"Row {place} of the {split} split"


def _unusable(problem: str) -> dict[str, Any]:
    return {
        "input_ids": [],
        "prompt_numel": 0,
        "cut_numel": 0,
        "prompt": "",
        "completion": "",
        "problem": problem,
    }
