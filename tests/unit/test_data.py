"""Data for launch/train.py: reading, encoding, batching, the loss over it, and the settings that hang on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_support import byte_tokenizer, encode, encoder, load, write_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_agsel.errors import ConfigError, DataError
from ds_agsel.report.log import JsonLines
from launch.data import batches, columns, encoding, sources
from launch.evaluation import scoring
from launch.training import objective, run_config
from launch.training.models import keeps_last_logits

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(count)]


# -- reading


def test_rows_for_validation_and_test_are_taken_out_of_train(tmp_path: Path) -> None:
    splits = load(write_rows(tmp_path / "all.jsonl", rows_of(20)))
    parts = [set(part["question"]) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [15, 2, 3]
    assert len(set.union(*parts)) == 20


def test_a_folder_s_own_splits_are_used(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", rows_of(8))
    write_rows(tmp_path / "dev.jsonl", rows_of(4))
    (tmp_path / "test.csv").write_text("question,answer\na,1\nb,2\n")
    splits = load(str(tmp_path))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 2, 2]


def test_parquet_and_csv_and_json_arrays_are_read(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(rows_of(9)).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows_of(9)).to_csv(tmp_path / "b.csv")
    (tmp_path / "c.json").write_text(json.dumps(rows_of(9)))
    for name in ("a.parquet", "b.csv", "c.json"):
        assert len(load(str(tmp_path / name)).train) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "is empty. Put at least one example into it."),
        ("blank.jsonl", "\n\n", "is empty. Put at least one example into it."),
        ("header.csv", "question,answer\n", "is empty. Put at least one example into it."),
        ("cut.jsonl", '{"question": "a", "answer": "1"}\n\n{"question": "b", "ans', "line 3 is no valid JSON"),
        ("list.jsonl", '{"question": "a", "answer": "1"}\n[1, 2]\n', "line 2 is list, not an object"),
        ("wide.csv", "question,answer\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("no.parquet", "PAR", "can't be read"),
        ("data.txt", "a", "is of an unknown kind. Use one of .json, .jsonl, .csv, .parquet"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_with_the_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "query"}, "has no column 'query'. Its columns: question, answer"),
        ({"completion_column": "output"}, "has no column 'output'. Its columns: question, answer"),
        ({"prompt_template": "Q: {task}"}, "has no column 'task'. Its columns: question, answer"),
        ({"validation_rows": 20}, "--validation-rows=20 of its 20 remaining train rows"),
    ],
)
def test_what_the_data_has_not_is_named_with_what_it_has(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    dataset = write_rows(tmp_path / "all.jsonl", rows_of(20))
    with pytest.raises(DataError, match=re.escape(message)):
        load(dataset, **options)


def test_unknown_column_names_must_be_told(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "all.jsonl", [{"a": "x", "b": "y"}] * 10)
    with pytest.raises(DataError, match=r"has the columns a, b: .* --prompt-column"):
        load(dataset)
    assert load(dataset, prompt_column="a", completion_column="b").columns.used == ("a", "b")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl' is not there"):
        load(str(tmp_path / "gone.jsonl"))


def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(*_: Any) -> None:
        raise FileNotFoundError("no such data set\nand a long story")

    monkeypatch.setattr(sources, "load_dataset", not_found)
    with pytest.raises(DataError, match=r"no such data set\. .*Known names: builtin, gsm8k, metamathqa"):
        load("gsm9k")


@pytest.mark.parametrize(
    "template", ["no column", "{}", "{0}", "{question", "{question.x}", "{question:d}", "{question!r}"]
)
def test_a_template_must_name_columns(template: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-template="):
        columns.template_columns(template)


def test_a_preset_is_read_from_the_folder_that_ds_agsel_data_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "2+2?", "answer": "<<2+2=4>>4"}\n' * 8)
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path))
    splits = load("gsm8k", validation_rows=1, test_rows=1)
    assert {splits.columns.completion_of(row) for row in splits.train} == {"4"}
    assert sources.local_copy("metamathqa") is None and sources.local_copy("train.jsonl") is None
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"DS_AGSEL_DATA='.*gone' is no folder"):
        load("gsm8k")


@pytest.mark.skipif(
    sources.local_copy("gsm8k") is None, reason="DS_AGSEL_DATA names no folder with gsm8k/train.jsonl and test.jsonl"
)
def test_gsm8k_is_read_where_it_lies_without_the_calculator_s_notes() -> None:
    splits = load("gsm8k", train_rows=50)
    assert len(splits.train) == 50 and len(splits.test) == 3
    assert not any("<<" in splits.columns.completion_of(row) for row in splits.train)


def test_builtin_needs_no_file_and_gives_the_sizes_asked_for() -> None:
    splits = load("builtin", train_rows=30, test_rows=0)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [30, 2, 0]


# -- encoding


def test_labels_are_the_completion_and_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode([{"question": "ab", "answer": "xyz"}], encoder(tokenizer))
    batch = batches.collate([[encoded.rows[0]]], tokenizer.pad_token_id)
    labels = batch["labels"][batch["labels"] != batches.IGNORED]
    assert tokenizer.decode(labels) == "xyz[end]"
    assert tokenizer.decode(batch["input_ids"][0]) == "ab\nxyz[end]"
    assert encoded.label_numel.tolist() == [4] and encoded.lengths.tolist() == [7]


def test_the_chat_template_is_used_and_nothing_is_learnt_after_the_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    chat = encoder(chatty, use_chat_template=True, system="s")
    assert chat.render("ab", "xyz") == ("<system>s[end]\n<user>ab[end]\n<assistant>", "xyz[end]")
    with pytest.raises(ConfigError, match="no chat template"):
        encoder(tokenizer, use_chat_template=True)


def test_truncation_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    part = [{"question": "ab", "answer": "x" * 20}, {"question": "ab", "answer": "x"}]
    encoded = encode(part, encoder(tokenizer, max_tokens=10))
    assert (encoded.cut_rows, encoded.cut_numel) == (1, 14)
    assert encoded.lengths.tolist() == [10, 5]


def test_a_prompt_without_room_for_a_completion_is_refused_or_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    part = [{"question": "ab", "answer": "x"}, {"question": "a" * 9, "answer": "x"}]
    message = r"Row 2 of the train split .* its prompt has 10 tokens and --sequence-length=10 .*--long-prompts=drop"
    with pytest.raises(DataError, match=message):
        encode(part, encoder(tokenizer, max_tokens=10))
    encoded = encode(part, encoder(tokenizer, max_tokens=10), drop_long_prompts=True)
    assert encoded.dropped_rows == 1 and len(encoded.rows) == 1
    with pytest.raises(DataError, match="No row of the train split is left"):
        encode(part[1:], encoder(tokenizer, max_tokens=10), drop_long_prompts=True)


def test_a_split_without_rows_is_encoded_too(tokenizer: PreTrainedTokenizerFast) -> None:
    part = load("builtin", train_rows=3, test_rows=0).test
    encoded = encoding.encode("test", part, encoder(tokenizer), workers=1, drop_long_prompts=False)
    assert len(encoded.rows) == len(encoded.lengths) == 0


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_an_empty_value_is_named_with_its_row(tokenizer: PreTrainedTokenizerFast, answer: str | None) -> None:
    part = [{"question": "ab", "answer": "x"}, {"question": "ab", "answer": answer}]
    with pytest.raises(DataError, match="Row 2 of the train split can't be used: its column 'answer' is empty"):
        encode(part, encoder(tokenizer))


def test_tokens_come_from_the_cache_the_second_time(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = load(write_rows(tmp_path / "all.jsonl", rows_of(40))).train
    first = encoding.encode("train", part, encoder(tokenizer), workers=2, drop_long_prompts=False)
    tokenizer("a call that changes the tokenizer's state", truncation=True, max_length=4)

    def not_again(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(encoding.Encoder, "_encode", not_again)
    second = encoding.encode("train", part, encoder(tokenizer), workers=2, drop_long_prompts=False)
    assert second.rows["input_ids"] == first.rows["input_ids"]
    with pytest.raises(AssertionError, match="tokenised again"):
        encoding.encode("train", part, encoder(tokenizer, max_tokens=63), workers=2, drop_long_prompts=False)
    tokenizer.eos_token = "e"  # another end of text, in the same vocabulary
    with pytest.raises(AssertionError, match="tokenised again"):
        encoding.encode("train", part, encoder(tokenizer), workers=2, drop_long_prompts=False)


# -- batching


def plan(rows: int = 50, seed: int = 1, **sizes: int) -> batches.EpochPlan:
    lengths = np.random.default_rng(0).integers(10, 100, rows)
    return batches.EpochPlan(
        lengths, batches.Batching(**{"micro_batch": 2, "accumulation": 2, "world_size": 2, **sizes}), seed
    )


def test_an_epoch_takes_each_row_once_at_most_and_epochs_differ() -> None:
    epochs = plan()
    assert epochs.steps_per_epoch == 6
    first = np.concatenate([epochs.rows_of(step).ravel() for step in range(6)])
    second = np.concatenate([epochs.rows_of(step).ravel() for step in range(6, 12)])
    assert len(set(first.tolist())) == len(first) == 48
    assert first.tolist() != second.tolist()


def test_a_step_s_rows_do_not_hang_on_the_steps_before() -> None:
    going_on = plan()
    expected = [going_on.rows_of(step) for step in range(20)]
    for step in (13, 2, 19):
        assert np.array_equal(plan().rows_of(step), expected[step])
    assert not np.array_equal(plan(seed=2).rows_of(0), expected[0])


def test_ranks_and_micro_steps_share_a_step_s_rows() -> None:
    one = plan(micro_batch=8, accumulation=1, world_size=1)
    two = plan(micro_batch=2, accumulation=2, world_size=2)
    for step in range(8):
        assert one.rows_of(step).shape == (1, 1, 8) and two.rows_of(step).shape == (2, 2, 2)
        assert one.rows_of(step).ravel().tolist() == two.rows_of(step).ravel().tolist()


def test_too_few_rows_for_a_step_are_refused() -> None:
    with pytest.raises(DataError, match="has 7 rows and one step takes 8"):
        plan(rows=7)


def test_packs_hold_every_example_once_and_no_more_than_they_can() -> None:
    lengths = np.random.default_rng(3).integers(1, 65, 500)
    packs = batches.pack(lengths, 64)
    assert sorted(example for pack in packs for example in pack) == list(range(500))
    assert max(int(lengths[list(pack)].sum()) for pack in packs) <= 64
    assert len(packs) <= 1.1 * lengths.sum() / 64


# -- loss


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double()


def examples(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    part = [{"question": "a" * n, "answer": "x" * (12 - n)} for n in (2, 5, 7)] + rows_of(2)
    return list(encode(part, encoder(tokenizer)).rows)


@pytest.mark.parametrize("keeps_last_logits", [True, False])
def test_the_loss_is_the_sum_over_completions_that_transformers_computes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, keeps_last_logits: bool
) -> None:
    batch = batches.collate([[example] for example in examples(tokenizer)], tokenizer.pad_token_id)
    ours = objective.completion_loss_sum(model, batch, keeps_last_logits=keeps_last_logits)
    label_numel = (batch["labels"] != batches.IGNORED).sum()
    # Ours is summed in fp32: 24 bits over some 30 terms.
    torch.testing.assert_close(ours.double(), model(**batch).loss.double() * label_numel, rtol=1e-5, atol=0)


@pytest.mark.parametrize("keeps_last_logits", [True, False])
def test_the_loss_of_each_row_is_that_of_the_row_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, keeps_last_logits: bool
) -> None:
    rows = examples(tokenizer)
    together = batches.collate([[example] for example in rows], tokenizer.pad_token_id)
    found = objective.completion_loss_of_rows(model, together, keeps_last_logits=keeps_last_logits)
    for loss, example in zip(found, rows, strict=True):
        alone = batches.collate([[example]], tokenizer.pad_token_id)
        expected = objective.completion_loss_sum(model, alone, keeps_last_logits=keeps_last_logits)
        torch.testing.assert_close(loss, expected.double(), rtol=1e-5, atol=0)


def test_the_head_is_applied_once_to_all_rows_and_not_to_each(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A slice of the hidden states, which is not contiguous, makes a frozen head several times slower than a thawed
    one: matmul copies its weight for each row of the batch."""
    assert keeps_last_logits(model)
    batch = batches.collate([[example] for example in examples(tokenizer)], tokenizer.pad_token_id)
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective.completion_loss_sum(model, batch, keeps_last_logits=True)
    handle.remove()
    [hidden] = seen
    assert hidden.shape[0] > 1 and hidden.shape[1] < batch["labels"].shape[1] and hidden.is_contiguous()


def test_packed_rows_give_the_loss_of_the_examples_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = batches.collate([[example] for example in examples(tokenizer)], tokenizer.pad_token_id)
    first, *rest = examples(tokenizer)
    packed = batches.collate([[first, *rest[:2]], rest[2:]], tokenizer.pad_token_id, packed=True)
    losses = [objective.completion_loss_sum(model, batch, keeps_last_logits=True) for batch in (alone, packed)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


# -- scoring, settings, logs


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### $1,200.0 in all 5", "1200"),
        ("The answer is: 3.50", "3.5"),
        ("First 3, then 4, so -12.", "-12"),
        ("The answer is: x + y", "x + y"),
        ("no number", "no number"),
        ("#### 0", "0"),
        ("#### 100", "100"),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert scoring.final_answer(text) == answer


def filled(config: dict[str, Any], **known: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"steps_per_epoch": 7, "total_steps": 70, "lr": None, "seed": 3, "section": {}}
    return run_config.complete(config, batches=batches.Batching(4, 2, 1), **{**defaults, **known})


def test_auto_and_null_are_filled_in_a_copy() -> None:
    config = {
        "optimizer": {"params": {"lr": 1e-3}},
        "scheduler": {"params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
        "adagrad_select": {"steps_per_epoch": None},
    }
    before = json.dumps(config)
    complete = filled(config)
    assert json.dumps(config) == before
    assert complete["scheduler"]["params"] == {"total_num_steps": 70, "warmup_num_steps": 7}
    assert complete["adagrad_select"] == {"steps_per_epoch": 7, "seed": 3}
    assert complete["train_micro_batch_size_per_gpu"] == 4 and complete["gradient_accumulation_steps"] == 2
    assert filled(config, lr=5e-4)["optimizer"]["params"]["lr"] == 5e-4
    assert filled({**config, "adagrad_select": {"seed": 9}})["adagrad_select"]["seed"] == 9


def test_an_auto_that_nobody_knows_is_named() -> None:
    with pytest.raises(ConfigError, match=r'zero_optimization\.reduce_bucket_size="auto" is not known'):
        filled({"zero_optimization": {"reduce_bucket_size": "auto"}})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train_batch_size": 16}, (8, 1)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, (2, 4)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 4}, (2, 4)),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5}, (3, 5)),
        ({"train_micro_batch_size_per_gpu": 3, "train_batch_size": "auto"}, (3, 1)),
    ],
)
def test_batch_sizes_are_read_as_deepspeed_reads_them(config: dict[str, Any], expected: tuple[int, int]) -> None:
    found = run_config.batching(config, 2, None, None)
    assert (found.micro_batch, found.accumulation) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "sets no batch size"),
        ({"train_batch_size": 7}, "train_batch_size=7 is not"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0 is not a whole number"),
    ],
)
def test_batch_sizes_that_can_not_be_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config.batching(config, 2, None, None)


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(5):
        log.write({"step": step})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"ste')  # killed while writing
    log = JsonLines(tmp_path / "log.jsonl", 3)
    log.write({"step": 3})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
