"""A tiny model and data for examples that are run without options. They need no network."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast


def model_and_tokenizer(name: str | None) -> tuple[AutoModelForCausalLM, PreTrainedTokenizerFast]:
    """Load those of a hub name or folder; None: a random Llama of 3 layers and a vocabulary of numbers."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "+", "=", *map(str, range(40))])}
    words = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape)), tokenizer


def rows(name: str | None, row_of: Callable[[int, int], dict[str, str]]) -> Dataset:
    """Return the training split of a hub name; None: ``row_of(a, b)`` of 64 pairs of numbers."""
    if name is not None:
        return load_dataset(name, split="train")
    return Dataset.from_list([row_of(a, b) for a in range(8) for b in range(8)])
