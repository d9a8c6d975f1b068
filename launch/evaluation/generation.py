"""Greedy answers of a causal language model to a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the model wrote after a prompt; ``truncated`` where it did not end by itself."""

    text: str
    truncated: bool


def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    device: Any,
    synced_gpus: bool = False,
) -> list[Answer]:
    """Generate the most likely token each time, until an end token, ``max_new_tokens`` or the model's last position.

    ``prompts`` are token ids. A repetition penalty of the model's generation config stays in force, as it does in
    lm-evaluation-harness. Collective with ``synced_gpus``.
    """
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    # Padded on the left: every row's next token is the last position's.
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        max_new_tokens = max(1, min(max_new_tokens, limit - longest))
    ends = _end_tokens(model, tokenizer)
    written = model.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=ends,
        synced_gpus=synced_gpus,
    )[:, longest:]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [Answer(text, truncated=not set(ends) & set(ids)) for text, ids in zip(texts, written.tolist())]


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end of text and those of the generation config."""
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [known]
    return sorted({tokenizer.eos_token_id, *(token for token in listed if token is not None)})
