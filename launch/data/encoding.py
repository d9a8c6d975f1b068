"""Text to tokens: chat template, loss on the completion only, truncation that is counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ds_agsel.errors import ConfigError, DataError

from .sources import TextColumns

_FORMAT_VERSION = 1  # part of the cache's key: raise it when an encoded row changes
CHAT_TEMPLATE_CHOICES = ("auto", "always", "never")
_ROWS_PER_WORKER = 1000  # below that a process costs more to start than it saves


def wants_chat_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``choice``, one of CHAT_TEMPLATE_CHOICES, means a chat template for this tokenizer."""
    return choice == "always" or (choice == "auto" and tokenizer.chat_template is not None)


@dataclass(frozen=True)
class Encoder:
    """Rows of text to rows of tokens. Picklable: tokenisation workers get it.

    Attributes:
        use_chat_template: render a prompt as a user's turn and a completion as the assistant's.
        system: text of the system turn; None leaves it to the template.
        max_tokens: longest row; a completion is cut there, a prompt must be shorter.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: TextColumns
    max_tokens: int
    use_chat_template: bool
    system: str | None = None

    def __post_init__(self) -> None:
        if self.use_chat_template and self.tokenizer.chat_template is None:
            raise ConfigError("--chat-template=always, but the tokenizer has no chat template. Use auto or never.")

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Columns of text to ``input_ids``, ``prompt_numel``, ``cut_numel`` and ``problem``.

        ``problem`` says why a row can't be used, "" where it can: an error raised here would be lost in a
        worker.
        """
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        encoded: dict[str, list[Any]] = {"input_ids": [], "prompt_numel": [], "cut_numel": [], "problem": []}
        for row in rows:
            for name, value in self._encode(row).items():
                encoded[name].append(value)
        return encoded

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        empty = [name for name in self.columns.used if row[name] is None or not str(row[name]).strip()]
        if empty:
            return _unusable(f"its column {empty[0]!r} is empty. Fill or remove it")
        prompt, completion = self.render(self.columns.prompt_of(row), self.columns.completion_of(row))
        prompt_ids = self._ids_of(prompt)
        completion_ids = self.tokenizer(completion, add_special_tokens=False).input_ids
        if len(prompt_ids) >= self.max_tokens:
            return _unusable(
                f"its prompt has {len(prompt_ids)} tokens and --sequence-length={self.max_tokens} leaves "
                f"no room for a "
                "completion. Use a larger one, or --long-prompts=drop"
            )
        ids = prompt_ids + completion_ids
        return {
            "input_ids": ids[: self.max_tokens],
            "prompt_numel": len(prompt_ids),
            "cut_numel": max(0, len(ids) - self.max_tokens),
            "problem": "",
        }

    def render(self, prompt: str, completion: str) -> tuple[str, str]:
        """The texts as the model sees them. The completion ends in the end-of-text token."""
        end = self.tokenizer.eos_token
        if not self.use_chat_template:
            return f"{prompt}\n", f"{completion}{end}"
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": prompt})
        opened = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": completion})
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(opened):  # a template that rewrites earlier turns
            return opened, f"{completion}{end}"
        return opened, whole[len(opened) :].split(end)[0].rstrip("\n") + end

    def prompt(self, text: str) -> tuple[str, list[int]]:
        """A prompt as the model sees it, and its tokens."""
        prompt, _ = self.render(text, "")
        return prompt, self._ids_of(prompt)

    def _ids_of(self, prompt: str) -> list[int]:
        # A chat template writes the special tokens itself; without one the tokenizer adds them, the last of
        # which may be an end of text that does not belong before a completion.
        ids = self.tokenizer(prompt, add_special_tokens=not self.use_chat_template).input_ids
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    @property
    def _vocabulary(self) -> Any:
        """How the tokenizer makes tokens, without the padding and truncation that its last call left in it."""
        if not self.tokenizer.is_fast:
            return sorted(self.tokenizer.get_vocab().items())
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return {name: value for name, value in state.items() if name not in ("padding", "truncation")}

    @property
    def fingerprint(self) -> str:
        """A name for all that decides about the tokens; tokenizers themselves do not hash alike twice."""
        parts = (
            _FORMAT_VERSION,
            self._vocabulary,
            self.tokenizer.chat_template,
            self.columns,
            self.max_tokens,
            self.use_chat_template,
            self.system,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Encoded:
    """A tokenised split.

    Attributes:
        rows: columns ``input_ids`` and ``prompt_numel``, with the text columns beside them.
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
    processes = min(workers, len(part) // _ROWS_PER_WORKER)
    rows = part.map(
        encoder,
        batched=True,
        num_proc=processes if processes > 1 else None,
        new_fingerprint=hashlib.sha256(f"{part._fingerprint}{encoder.fingerprint}".encode()).hexdigest()[:32],
        desc=f"tokenising {split}",
    )
    problems = np.asarray(rows["problem"], dtype=object)
    usable = np.flatnonzero(problems == "")
    for index in np.flatnonzero(problems != ""):
        if not (drop_long_prompts and "--long-prompts" in problems[index]):
            raise DataError(f"Row {index + 1} of the {split} split can't be used: {problems[index]}.")
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


def _unusable(problem: str) -> dict[str, Any]:
    return {"input_ids": [], "prompt_numel": 0, "cut_numel": 0, "problem": problem}
