"""launch/evaluate.py on a model that knows some answers by heart, and once against lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_agsel.errors import ConfigError, DataError
from launch.data import sources
from launch.data.batches import collate
from launch.data.encoding import Encoder
from launch.evaluation import answering, command
from launch.evaluation.options import EvaluationOptions
from launch.intervals import wilson_interval
from launch.training import models

ROOT = Path(__file__).parents[2]
# MATH's form, and what the model has learnt to answer.
PROBLEMS = [
    ("What is half of one?", r"It is $\boxed{\frac{1}{2}}$.", "The answer is: 0.5"),
    ("2+2?", r"\boxed{4}", r"\boxed{4}"),
    ("Solve $x^2=9$ for all real x, please.", r"So $x=\boxed{-3,3}$.", r"The answer is: 3,-3"),
    ("Where does the sun rise?", r"\boxed{\text{east}}", r"\boxed{\text{west}}"),
    ("How many?", r"\boxed{12}", "#### 12 of 13"),
    ("And how many in the end, if it is not 12 but 1 less?", r"\boxed{11}", "I do not know"),
]
CORRECT = [True, True, True, False, True, False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level Llama of one layer that has learnt its answers, and math.jsonl, its problems."""
    folder = tmp_path_factory.mktemp("knowing")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(token_models.BPE({token: i for i, token in enumerate(["[end]", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]", pad_token="[end]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    encoder = Encoder(tokenizer, sources.TextColumns("problem", "learnt"), max_tokens=128, use_chat_template=False)
    encoded = encoder({"problem": [p for p, _, _ in PROBLEMS], "learnt": [learnt for _, _, learnt in PROBLEMS]})
    rows = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
    batch = collate([[row] for row in rows], pad_token_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1e-2
    model.save_pretrained(folder)
    lines = [json.dumps({"problem": p, "solution": s, "level": "Level 1", "type": "Algebra"}) for p, s, _ in PROBLEMS]
    (folder / "math.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def evaluated(folder: Path, output: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    options = {"dataset": str(folder / "math.jsonl"), "batch_size": 4, "max_new_tokens": 40, **options}
    accuracy = answering.evaluate(EvaluationOptions(model=str(folder), output=str(output), **options))
    assert json.loads((output / "accuracy.json").read_text()) == accuracy
    return accuracy, lines_of(output)


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_problems_in_the_form_of_math_are_answered_and_judged(folder: Path, tmp_path: Path) -> None:
    accuracy, records = evaluated(folder, tmp_path)
    assert [record["prompt"] for record in records] == [f"{prompt}\n" for prompt, _, _ in PROBLEMS]
    assert [record["output"] for record in records] == [learnt for _, _, learnt in PROBLEMS]
    assert [record["correct"] for record in records] == CORRECT
    assert [record["expected"] for record in records][:2] == [r"\frac{1}{2}", "4"]
    assert records[2]["extracted"] == "3,-3" and records[5]["extracted"] is None
    low, high = wilson_interval(4, 6)
    found = {name: accuracy[name] for name in ("rows", "correct", "unanswered", "truncated")}
    assert found == {"rows": 6, "correct": 4, "unanswered": 1, "truncated": 0}
    percent = (accuracy["accuracy_percent"], accuracy["low_percent"], accuracy["high_percent"])
    assert percent == pytest.approx((400 / 6, 100 * low, 100 * high))
    assert accuracy["dtype"] == "float32" and "math_verify" in accuracy["versions"]


def test_how_many_are_answered_together_changes_nothing(folder: Path, tmp_path: Path) -> None:
    _, together = evaluated(folder, tmp_path / "together", batch_size=6)
    _, alone = evaluated(folder, tmp_path / "alone", batch_size=1)
    assert without_times(together) == without_times(alone)


def test_an_answer_that_does_not_end_is_told(folder: Path, tmp_path: Path) -> None:
    accuracy, records = evaluated(folder, tmp_path, max_new_tokens=9, rows=2)
    # "\boxed{4}" has nine tokens: there is no room for its end.
    assert [record["output"] for record in records] == ["The answe", r"\boxed{4}"]
    assert [record["truncated"] for record in records] == [True, True] and accuracy["truncated"] == 2
    _, records = evaluated(folder, tmp_path / "longer", max_new_tokens=10, rows=2)
    assert [record["truncated"] for record in records] == [True, False]


def test_a_chat_template_is_given_no_system_turn_unless_asked(folder: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(str(folder))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    for options, prompt in (
        ({}, "<user>2+2?<assistant>"),
        ({"system": "Be brief."}, "<system>Be brief.<user>2+2?<assistant>"),
        ({"chat_template": "never"}, "2+2?\n"),
    ):
        dataset = str(folder / "math.jsonl")
        wanted = EvaluationOptions(model=str(folder), output=str(tmp_path), dataset=dataset, **options)
        assert answering.load_problems(wanted.completed(), tokenizer)[1].prompt == prompt


def test_an_adapter_is_merged(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tuned = get_peft_model(
        models.load_model(str(folder)),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    models.load_tokenizer(str(folder)).save_pretrained(tmp_path / "merged")
    dataset = str(folder / "math.jsonl")
    _, plain = evaluated(folder, tmp_path / "plain")
    _, adapted = evaluated(folder, tmp_path / "adapted", adapter=str(tmp_path / "adapter"))
    _, merged = evaluated(tmp_path / "merged", tmp_path / "whole", dataset=dataset)
    assert without_times(adapted) == without_times(merged) != without_times(plain)


# -- stopping, resuming


def test_a_killed_evaluation_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    options = {"dataset": "builtin", "builtin_level": 1, "rows": 60, "batch_size": 1, "max_new_tokens": 48}
    expected, answers = evaluated(folder, tmp_path / "whole", **options)

    killed = tmp_path / "killed"
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "launch/evaluate.py", "--model", str(folder), "--output", str(killed), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    file = killed / "answers.jsonl"
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.read_bytes().count(b"\n")
    assert 2 <= done < 60 and not (killed / "accuracy.json").exists()
    before = file.read_text().splitlines()[:done]
    with open(file, "a") as torn:
        torn.write('{"prompt": "half a li')

    going_on, records = evaluated(folder, killed, resume=True, **options)
    assert file.read_text().splitlines()[:done] == before  # with their times: they were not answered again
    assert without_times(records) == without_times(answers)
    assert {**going_on, "seconds": 0} == {**expected, "seconds": 0}


def test_another_evaluation_s_answers_are_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    evaluated(folder, tmp_path, rows=2)
    with pytest.raises(ConfigError, match=r"holds an earlier evaluation\. Use --resume"):
        evaluated(folder, tmp_path)
    with pytest.raises(ConfigError, match="was begun with max_new_tokens 40; this evaluation has 41"):
        evaluated(folder, tmp_path, resume=True, max_new_tokens=41)
    accuracy, _ = evaluated(folder, tmp_path, resume=True)  # more rows may be
    assert accuracy["rows"] == 6
    problems = folder / "math.jsonl"
    text = problems.read_text()
    try:
        problems.write_text("".join(reversed(text.splitlines(keepends=True))))
        with pytest.raises(ConfigError, match=r"line 1 of .* answers another problem"):
            evaluated(folder, tmp_path, resume=True)
    finally:
        problems.write_text(text)
    accuracy, _ = evaluated(folder, tmp_path, overwrite=True, rows=1)
    assert accuracy["rows"] == 1 and len(lines_of(tmp_path)) == 1


# -- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows=0 is outside [1, inf)"),
        (["--batch-size", "0"], "--batch-size=0 is outside [1, inf)"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--chat-template", "always"], "the tokenizer has no chat template"),
        (["--adapter", "/nowhere"], "--adapter='/nowhere' can't be loaded"),
        (["--model", "/nowhere"], "model='/nowhere' can't be loaded"),
        (["--dataset", "/nowhere.jsonl"], "dataset='/nowhere.jsonl' is not there"),
    ],
)
def test_what_can_not_be_is_one_line_and_leaves_no_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = ["--model", str(folder), "--output", str(tmp_path / "out"), "--dataset", str(folder / "math.jsonl")]
    assert command.main([*given, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_reference_without_an_answer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(
        '{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "who knows"}\n'
    )
    with pytest.raises(DataError, match=r"Row 2 of .* has no answer in 'who knows'"):
        evaluated(folder, tmp_path / "out", dataset=str(tmp_path / "bad.jsonl"))


def test_a_prompt_that_leaves_no_room_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "a" * 127, "answer": "#### 1"}) + "\n")
    with pytest.raises(ConfigError, match=r"has 128 tokens; .* takes 128 with the answer"):
        evaluated(folder, tmp_path / "out", dataset=str(tmp_path / "long.jsonl"))


# -- lm-evaluation-harness

LM_EVAL_VERSION = "0.4.13"
# As its task gsm8k has it, but for the prompt (the question alone, zero-shot), the data (a file) and no stop words.
LM_EVAL_TASK = r"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {max_new_tokens}}}
num_fewshot: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: [",", "\\$", "(?s).*#### ", "\\.$"]
filter_list:
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
"""


@pytest.fixture(scope="module")
def lm_eval() -> Path:
    """The Python of an environment with lm-evaluation-harness, which needs other versions of what we need."""
    environment = models.cache_folder() / "lm_eval"
    python = environment / "bin" / "python"
    if not (environment / f".{LM_EVAL_VERSION}").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        constraints = ["-c", str(ROOT / "constraints.txt")]
        install = [python, "-m", "pip", "install", "--quiet", *constraints, f"lm-eval[hf]=={LM_EVAL_VERSION}", "torch"]
        subprocess.run(install, check=True)
        (environment / f".{LM_EVAL_VERSION}").touch()
    return python


def judged_by_lm_eval(
    python: Path, model: str, rows: list[dict[str, str]], folder: Path, max_new_tokens: int
) -> list[dict[str, Any]]:
    """What the harness says of each row: its prompt, the model's output, what it extracted and its verdict."""
    folder.mkdir()
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = LM_EVAL_TASK.format(name="problems", file=problems, max_new_tokens=max_new_tokens)
    (folder / "problems.yaml").write_text(task)
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", "problems", "--include_path", folder, "--apply_chat_template", "--batch_size", "10"]
    command += ["--device", "cpu", "--log_samples", "--output_path", folder / "results"]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=folder, env={**quiet, "HF_HUB_OFFLINE": "1"}, check=True)
    [samples] = (folder / "results").rglob("samples_problems_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return [
        {
            "prompt": sample["arguments"]["gen_args_0"]["arg_0"],
            "output": sample["resps"][0][0],
            "extracted": sample["filtered_resps"][0],
            "correct": sample["exact_match"] == 1,
        }
        for sample in sorted(found, key=lambda sample: sample["doc_id"])
    ]


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2-135M after half of `make train`, which solves a good part of the built-in problems."""
    output = tmp_path_factory.mktemp("trained")
    options = "--model smollm2 --dataset builtin --builtin-level 1 --train-rows 640 --validation-rows 0 --test-rows 0"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    command = [*launcher, "launch/train.py", "--deepspeed_config", "configs/zero2_offload.json", *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=environment, check=True)
    return str(output / "model")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "max_new_tokens"), [("builtin", 32), ("gsm8k", 256)])
def test_lm_evaluation_harness_agrees(
    name: str, max_new_tokens: int, lm_eval: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Same model, same 50 problems. SmolLM2-135M solves next to none of GSM8K's, but writes as many answers to read."""
    if name == "gsm8k" and sources.local_copy("gsm8k") is None:
        pytest.skip("DS_AGSEL_DATA names no folder with gsm8k/test.jsonl")
    model = request.getfixturevalue("trained_model") if name == "builtin" else str(models.smollm2_folder())
    accuracy = answering.evaluate(
        EvaluationOptions(
            model=model, dataset=name, rows=50, batch_size=10, max_new_tokens=max_new_tokens, dtype="float32",
            builtin_level=1, output=str(tmp_path / "ours"),
        )
    )  # fmt: skip
    ours = lines_of(tmp_path / "ours")
    part, columns = sources.load_test(sources.DataOptions(name, test_rows=50, train_rows=1, builtin_level=1))
    rows = [{"question": columns.prompt_of(row), "answer": columns.completion_of(row)} for row in part]
    theirs = judged_by_lm_eval(lm_eval, model, rows, tmp_path / "theirs", max_new_tokens)
    pairs = list(zip(ours, theirs, strict=True))
    assert all(our["prompt"] == their["prompt"] for our, their in pairs)
    same = [(our, their) for our, their in pairs if our["output"] == their["output"]]
    apart = [(our, their) for our, their in pairs if our["correct"] != their["correct"]]
    print(
        f"\n{name}: correct {accuracy['correct']} (evaluate.py), {sum(their['correct'] for their in theirs)} (lm-eval)"
        f" of {len(pairs)}; same output {len(same)}, another verdict {len(apart)}"
    )
    for our, their in apart:
        print(json.dumps({"ours": our, "theirs": their}, indent=1))
    # Batches are made up otherwise, so that rounding may tip a token; from there on the texts differ.
    assert len(same) >= 45
    assert all(our["output"] != their["output"] for our, their in apart)
