"""SmolLM2's tokenizer is what its GGUF file says, whatever transformers makes of such a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from ds_agsel.errors import ConfigError
from launch.training.llama_gguf import tokenizer_of

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_gguf(file: Path, kind: str = "smollm") -> GGUFReader:
    """Write the head of a GGUF file: bytes, "ĠĠ" and three special tokens, end and padding the last of these."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"]
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFReader(file)


def test_special_tokens_and_template_are_the_file_s(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    tokenizer_of(write_gguf(file), file).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    named = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert named == (*SPECIAL, "<|im_end|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_text_comes_back_and_digits_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    tokenizer = tokenizer_of(write_gguf(file), file)
    text = "It isn't 12 .\n 漢  7  a"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Two spaces before a digit are one token; before a letter the second begins the word.
    assert tokenizer.tokenize("a  7") == ["a", "ĠĠ", "7"]
    assert tokenizer.tokenize("a  b") == ["a", "Ġ", "Ġ", "b"]


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"model.gguf has a tokenizer of the kind gpt2/qwen2\. Use a model with"):
        tokenizer_of(write_gguf(file, "qwen2"), file)
