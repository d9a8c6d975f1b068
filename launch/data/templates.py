"""Render conversations by a tokenizer's chat template, and check that no part of an answer is lost or repeated."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ds_agsel.errors import ConfigError

from .chat import Turn, UnusableRow, assistant_turn, user_turn

_PROBE_PROMPT, _PROBE_ANSWER = "What does the quick brown fox jump over?", "It jumps over the lazy dog, they say."
_LEAST_TO_COMPARE = 8  # characters: a shorter answer may occur twice by chance


class ChatTemplate:
    """The chat template of ``tokenizer``, tried once with a question and an answer.

    ``system`` is the text of the system turn of conversations that have none; None leaves it to the template. Raise
    ConfigError for a template that refuses such a conversation, or that drops or repeats a part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None):
        if tokenizer.chat_template is None:
            raise ConfigError("--chat-template=always, but the tokenizer has no chat template. Use auto or never.")
        self._tokenizer = tokenizer
        self._end = str(tokenizer.eos_token)
        self._system = system
        self._in_parts = False  # whether contents are lists of parts, as templates of vision-language models want them
        try:
            self._try()
        except UnusableRow as plain:
            self._in_parts = True
            try:
                self._try()
            except UnusableRow:
                raise ConfigError(
                    f"The tokenizer's chat template can't be used: {plain}. Use --chat-template=never, "
                    "or a tokenizer with another template."
                ) from None

    def opened(self, turns: Sequence[Turn]) -> str:
        """Return ``turns`` up to where the assistant's answer begins. Raise UnusableRow."""
        turns = self._with_system(turns)
        text = self._apply(turns, add_generation_prompt=True)
        squashed = _squash(text)
        for turn in turns:
            if turn["role"] in ("system", "user") and _squash(turn["content"]) not in squashed:
                raise UnusableRow(f"the chat template leaves out the {turn['role']}'s turn")
        return text

    def render(self, turns: Sequence[Turn], completion: str) -> tuple[str, str]:
        """Return the text before the answer and the text to learn: the answer, once, and the end of text.

        The template's own form of the answer is taken where all of the answer is in it; a template that rewrites it
        (one that cuts reasoning off) only opens the turn, and the answer is put there as it is. Raise UnusableRow.
        """
        opened = self.opened(turns)
        turns = self._with_system(turns)
        whole = self._apply([*turns, assistant_turn(completion)], add_generation_prompt=False)
        if whole.startswith(opened):
            learnt = self._up_to_end(whole[len(opened) :], completion)
            if _holds_once(learnt, completion):
                return opened, learnt
        return opened, completion[self._opened_already(opened, turns, completion) :] + self._end

    def _try(self) -> None:
        turns = [user_turn(_PROBE_PROMPT)]
        opened, learnt = self.render(turns, _PROBE_ANSWER)
        if _PROBE_ANSWER in opened or not _holds_once(learnt, _PROBE_ANSWER):
            raise UnusableRow("it drops or repeats a part of the answer")

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        if self._system is None or turns[0]["role"] in ("system", "developer"):
            return list(turns)
        return [{"role": "system", "content": self._system}, *turns]

    def _apply(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        messages = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} if self._in_parts else turn
            for turn in turns
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template is a program: whatever it raises is about this conversation
            text = str(error).strip() or type(error).__name__
            raise UnusableRow(f"the chat template refuses it: {text.splitlines()[0].rstrip('.')}") from None

    def _up_to_end(self, text: str, completion: str) -> str:
        """Return ``text`` up to the end of text that follows the answer, not one that the answer itself names."""
        for answer in (completion, completion.strip()):
            start = text.find(answer)
            if start >= 0:
                after = start + len(answer)
                return text[:after] + text[after:].split(self._end)[0].rstrip("\n") + self._end
        return text.rpartition(self._end)[0].rstrip("\n") + self._end if self._end in text else text + self._end

    def _opened_already(self, opened: str, turns: Sequence[Turn], completion: str) -> int:
        """Return how many characters of the answer the opened turn ends in: a tag such as ``<think>``."""
        bare = self._apply(turns, add_generation_prompt=False)
        tail = opened[len(bare) :] if opened.startswith(bare) else ""
        tag = re.search(r".(<[^<>]+>)\s*$", tail, re.DOTALL)
        if tag is None:
            return 0
        start = re.match(rf"\s*{re.escape(tag[1])}\n*", completion)
        return start.end() if start else 0


def _squash(text: str) -> str:
    return "".join(text.split())


def _holds_once(learnt: str, completion: str) -> bool:
    """Return whether all of the answer is in ``learnt``, white space apart, and a long one not twice."""
    text, answer = _squash(learnt), _squash(completion)
    before, found, after = text.partition(answer)
    return bool(found) and (len(answer) < _LEAST_TO_COMPARE or answer not in before + after)
