"""Small files, a byte tokenizer, and the ways of launch/data from one to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.data import encoding, sources
from launch.data.columns import TextColumns

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte and an end of text, "[end]"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["[end]", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]", pad_token="[end]")
    tokenizer.chat_template = chat_template
    return tokenizer


def write_rows(file: Path, rows: list[Any]) -> str:
    """Write ``rows`` to ``file``, a JSON value a line, and return its path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(dataset: str, **options: Any) -> sources.Splits:
    """Load ``dataset`` with 2 rows for validation and 3 for testing, unless ``options`` say otherwise."""
    return sources.load(sources.DataOptions(dataset, **{"validation_rows": 2, "test_rows": 3, **options}))


def encoder(tokenizer: PreTrainedTokenizerFast, **options: Any) -> encoding.Encoder:
    """Return an encoder of question and answer to at most 64 tokens, unless ``options`` say otherwise."""
    columns = TextColumns("question", "answer")
    return encoding.Encoder(
        **{"tokenizer": tokenizer, "columns": columns, "max_tokens": 64, "use_chat_template": False, **options}
    )


def encode(part: list[dict[str, Any]], with_encoder: encoding.Encoder, **options: Any) -> encoding.Encoded:
    """Return ``part`` encoded as the train split."""
    options = {"workers": 1, "drop_long_prompts": False, **options}
    return encoding.encode("train", Dataset.from_list(part), with_encoder, **options)


def learnt(dataset: str, chat_template: str | None = None, **options: Any) -> list[tuple[str, str]]:
    """Return the prompts and learnt texts that training on the file ``dataset`` sees, in the order of its rows."""
    splits = load(dataset, validation_rows=0, test_rows=0, **options)
    tokenizer = byte_tokenizer(chat_template)
    use = encoding.wants_chat_template("auto", tokenizer)
    encoded = encoding.encode(
        "train",
        splits.train.sort("__place__"),
        encoder(tokenizer, columns=splits.columns, max_tokens=4000, use_chat_template=use),
        workers=1,
        drop_long_prompts=False,
    )
    rows = [(row["input_ids"], row["prompt_numel"]) for row in encoded.rows]
    return [(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])) for ids, start in rows]
