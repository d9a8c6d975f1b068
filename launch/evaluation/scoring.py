"""Score the model in training: loss on the validation split, exact match of answers on the test split.

`launch/evaluate.py` judges a model that was saved, by equivalence in place of equality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from ..data.batches import collate
from ..data.encoding import Encoded
from ..training import ranks
from ..training.objective import completion_loss_of_rows
from ..training.stopping import StopRequest
from .generation import greedy

_MARKED_ANSWER = re.compile(r"####|the (?:final )?answer is:?", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Generation:
    """One test problem, the expected answer and the model's text."""

    prompt: str
    expected: str
    generated: str
    correct: bool


@dataclass(frozen=True)
class ExactMatch:
    """How many generated answers equal the expected ones."""

    generations: tuple[Generation, ...]

    @property
    def total(self) -> int:
        """Problems tried."""
        return len(self.generations)

    @property
    def correct(self) -> int:
        """Problems solved."""
        return sum(generation.correct for generation in self.generations)

    @property
    def percent(self) -> float:
        """Share of problems solved."""
        return 100 * self.correct / self.total


def final_answer(text: str) -> str:
    """Return the answer in ``text``: what follows ``####`` or "the answer is", else the last number.

    Numbers are brought to one form (``1,200.0`` is ``1200``); without any the answer is the text itself.
    """
    marks = list(_MARKED_ANSWER.finditer(text))
    if marks:
        after = text[marks[-1].end() :]
        numbers = _NUMBER.findall(after)
        return _normal_number(numbers[0]) if numbers else " ".join(after.split())
    numbers = _NUMBER.findall(text)
    return _normal_number(numbers[-1]) if numbers else " ".join(text.split())


def _normal_number(number: str) -> str:
    try:
        value = Decimal(number.replace(",", ""))
    except InvalidOperation:
        return number
    return f"{value.normalize():f}" if value else "0"


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    """Set evaluation mode without gradients inside, and training mode after."""
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()


def _batches_of_this_rank(lengths: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, bool]]:
    """Return the row indices in batches of like length; the ranks take turns, the longest batches first.

    All ranks get equally many, as forward is collective with ZeRO-3; False marks a batch that only fills up.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = [(order[start : start + batch_size], True) for start in range(0, len(order), batch_size)]
    batches += [(batches[-1][0], False)] * (-len(batches) % dist.get_world_size())
    return batches[dist.get_rank() :: dist.get_world_size()]


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy over completion tokens of a split, row by row in its order: sums, and numbers of tokens."""

    row_sums: tuple[float, ...]
    row_tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The mean over all tokens."""
        return math.fsum(self.row_sums) / sum(self.row_tokens)


def held_out_losses(
    engine: Any, encoded: Encoded, *, batch_size: int, pad_token_id: int, keeps_last_logits: bool
) -> HeldOut | None:
    """Return the losses of the whole split; None for an empty one. Collective."""
    if len(encoded.rows) == 0:
        return None
    row_sums = np.zeros(len(encoded.rows))
    with _evaluating(engine):
        for indices, counts in _batches_of_this_rank(encoded.lengths, batch_size):
            rows = [[encoded.rows[int(index)]] for index in indices]
            batch = to_device(collate(rows, pad_token_id), engine.device)
            losses = completion_loss_of_rows(engine, batch, keeps_last_logits=keeps_last_logits)
            if counts:
                row_sums[indices] = losses.numpy()
    return HeldOut(tuple(ranks.add_up(*row_sums)), tuple(int(numel) for numel in encoded.label_numel))


def exact_match(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: StopRequest,
) -> ExactMatch | None:
    """Score greedy answers to the split's prompts; None for an empty split or after a stop signal. Collective."""
    if len(encoded.rows) == 0:
        return None
    found: list[tuple[int, Generation]] = []
    prompt_numel = np.asarray(encoded.rows["prompt_numel"], dtype=np.int64)
    with _evaluating(engine), _autocast(engine):
        for indices, counts in _batches_of_this_rank(prompt_numel, batch_size):
            if stop.agreed():
                break
            rows = [encoded.rows[int(index)] for index in indices]
            prompts = [row["input_ids"][: row["prompt_numel"]] for row in rows]
            synced = engine.zero_optimization_partition_weights() and dist.get_world_size() > 1
            answers = greedy(
                engine.module, tokenizer, prompts, max_new_tokens, device=engine.device, synced_gpus=synced
            )
            if not counts:
                continue
            for index, row, answer in zip(indices, rows, answers):
                expected = row["completion"]
                correct = final_answer(answer.text) == final_answer(expected)
                found.append((int(index), Generation(row["prompt"], expected, answer.text, correct)))
    everything = ranks.gather(found)
    if stop.agreed():
        return None
    return ExactMatch(tuple(generation for _, generation in sorted(everything, key=lambda item: item[0])))


def _autocast(engine: Any) -> Any:
    """Return the autocast that DeepSpeed's forward uses with torch_autocast; generation bypasses that forward."""
    if not engine.torch_autocast_enabled():
        return nullcontext()
    return torch.autocast(get_accelerator().device_name(), dtype=engine.torch_autocast_dtype())


def to_device(batch: dict[str, torch.Tensor], device: Any) -> dict[str, torch.Tensor]:
    """Return the batch on ``device``."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
