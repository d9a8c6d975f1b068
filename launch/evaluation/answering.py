"""Answers of a saved model to problems, judged one by one, written as they are found."""

from __future__ import annotations

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

from ds_agsel.errors import ConfigError, DataError
from ds_agsel.report.log import JsonLines

from .. import intervals, versions
from ..data import encoding, sources
from ..data.chat import UnusableRow
from ..training import models
from . import grading
from .generation import greedy
from .options import EvaluationOptions

ANSWERS_FILE, ACCURACY_FILE, _SETTINGS_FILE = "answers.jsonl", "accuracy.json", "settings.json"
_SECONDS_BETWEEN_BARS = 10  # in a log file; a terminal gets tqdm's own
_BUILTIN_ROWS = 200  # of the built-in problems, which have no end
# When an evaluation goes on.
_FREE_TO_CHANGE = ("output", "rows", "batch_size", "resume", "overwrite", "without_run_settings")


@dataclass(frozen=True)
class Problem:
    """A problem as the model gets it, its worked solution, and the answer of that."""

    prompt: str
    prompt_ids: tuple[int, ...]
    reference: str
    answer: grading.Parsed


def evaluate(wanted: EvaluationOptions) -> dict[str, Any]:
    """Answer the problems, write both files, return what ``accuracy.json`` says.

    Raises ConfigError and DataError before the first answer. From the main thread only: math-verify limits the time
    that it takes by signals.
    """
    wanted = wanted.completed()
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


def load_problems(wanted: EvaluationOptions, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Return the problems in their order; ``wanted`` is `completed`. Raise DataError for one without an answer."""
    part, columns = sources.load_test(
        sources.DataOptions(
            dataset=str(wanted.dataset),
            dataset_config=wanted.dataset_config,
            prompt_column=wanted.prompt_column,
            completion_column=wanted.completion_column,
            prompt_template=wanted.prompt_template,
            test_split=wanted.test_split,
            train_rows=1,
            validation_rows=0,
            test_rows=wanted.rows or (_BUILTIN_ROWS if wanted.dataset == sources.BUILTIN else sys.maxsize),
            builtin_level=int(wanted.builtin_level or 0),
            seed=int(wanted.seed or 0),
        )
    )
    encoder = encoding.Encoder(
        tokenizer=tokenizer,
        columns=columns,
        max_tokens=sys.maxsize,
        use_chat_template=encoding.wants_chat_template(str(wanted.chat_template), tokenizer),
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
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], wanted: EvaluationOptions
) -> Iterator[dict[str, Any]]:
    """Yield a record for each problem, in order, a batch at a time."""
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


def _load_model(wanted: EvaluationOptions) -> Any:
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


def _check_room(model: Any, problems: Sequence[Problem], wanted: EvaluationOptions) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(problem.prompt_ids) for problem in problems)
    if limit is not None and longest >= limit:
        raise ConfigError(
            f"A prompt of {wanted.dataset} has {longest} tokens; {wanted.model} takes {limit} with the answer. "
            "Use another model or leave that problem out."
        )


def _earlier_answers(wanted: EvaluationOptions, output: Path, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return the earlier answers; make the folder. Raises ConfigError for another evaluation's folder."""
    options = {name: value for name, value in asdict(wanted).items() if name not in _FREE_TO_CHANGE}
    answers, settings_file = output / ANSWERS_FILE, output / _SETTINGS_FILE
    if wanted.resume and settings_file.is_file():
        there = json.loads(settings_file.read_text(encoding="utf-8"))
        for name, value in options.items():
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
        settings_file.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
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
    """Return the records before the first line that a kill cut short."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _accuracy(wanted: EvaluationOptions, dtype: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    correct = sum(record["correct"] for record in records)
    low, high = intervals.wilson_interval(correct, len(records))
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
        "versions": versions.of_a_run("math-verify"),
        "seconds": sum(record["seconds"] for record in records),
    }
