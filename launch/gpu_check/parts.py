"""The parts of the check in their order, for a card and for the dry run on a CPU. Pure: what runs, and for how long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

TOTAL_SECONDS = 25 * 60
STAGES = (1, 2, 3)
HOMES = ("none", "cpu", "visit", "visit-all")
LEAN_HOMES = ("cpu-bf16", "cpu-split", "visit-bf16", "visit-int8", "visit-split")
LORA = "lora-256"
STEPS_A_TURN = 4


@dataclass(frozen=True)
class Size:
    """How large a check is.

    Attributes:
        models: for the parts about memory and traffic: names of `ds_agsel.estimate.models.known_models`, or "tiny".
        shape: of the benchmark's Llama, as words of its command line.
        steps: optimizer steps of each case of the parts memory and floor.
        turns: that are timed, of `STEPS_A_TURN` steps, for each engine.
        percentages: of `select_percent`, the most informative first.
        lean_stages: for states that rest in fewer bytes.
    """

    models: tuple[str, ...]
    shape: tuple[str, ...]
    micro_batch: int
    sequence_length: int
    steps: int
    turns: int
    matrix_steps: int
    percentages: tuple[int, ...] = (20, 10, 30)
    lean_stages: tuple[int, ...] = STAGES


CARD = Size(
    models=("qwen2.5-0.5b", "qwen2.5-1.5b"),
    # Qwen2.5-0.5B's shape, as a Llama.
    shape=(
        "--hidden-size", "896", "--intermediate-size", "4864", "--layers", "24", "--heads", "14", "--kv-heads", "2",
        "--vocab-size", "151936",
    ),
    micro_batch=4, sequence_length=1024, steps=10, turns=6, matrix_steps=40,
)  # fmt: skip
DRY = Size(
    models=("tiny",),
    shape=(
        "--hidden-size", "32", "--intermediate-size", "64", "--layers", "3", "--heads", "4", "--kv-heads", "2",
        "--vocab-size", "128", "--threads", "1",
    ),
    micro_batch=2, sequence_length=16, steps=2, turns=2, matrix_steps=3, percentages=(20,), lean_stages=(2,),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        cases: what its worker does, one after the other; a case that dies is left out when the worker starts again.
            Empty for a part that is a command of its own.
        command: that command; its results are read from its exit code, its log and ``result_file``.
        limit_seconds: of the whole part. It is killed then, and what it has written by then counts.
    """

    name: str
    about: str
    limit_seconds: int
    cases: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    result_file: str | None = None


def parts(size: Size, is_dry: bool, output: Path) -> Iterator[Part]:
    """Yield the parts, the most informative first. Their limits add up to more than the time there is for all."""
    python = sys.executable
    build = (python, "-m", "ds_agsel.zero.build_ops")
    found = [
        Part("build", "the ops compile", 600, command=build),
        Part("matrix", "each configuration trains: frozen blocks bit for bit, losses as on the CPU", 360, matrix(size)),
        Part(
            "tests",
            "the tests that need a device",
            400,
            command=(python, "-m", "pytest", "tests/device", "-q", "-m", "device"),
        ),
        Part("memory", "peak bytes against the estimate", 420, tuple(memory_cases(size))),
        Part("time", "steps of each method and of plain DeepSpeed in turn", 360, tuple(time_cases(size))),
        Part(
            "floor",
            "against the necessary work",
            150,
            command=_benchmark(size, output),
            result_file="benchmark/benchmark.json",
        ),
        Part("trace", "a profile of exploit and of explore steps", 150, tuple(traces(size))),
        Part("transfers", "measured rates, and exposed time against the model", 150, transfers(size)),
    ]
    if is_dry:
        yield from (replace(part, limit_seconds=min(part.limit_seconds, 300)) for part in found if part.name != "build")
        return
    yield from found
    yield Part("smollm2", "SmolLM2-135M learns sums, where its weights are at hand", 240, command=_finetune(output))


def matrix(size: Size) -> tuple[str, ...]:
    """Return the configurations that are trained: stage, where the optimizer's states are, and their form."""
    kinds = ((STAGES, HOMES), (size.lean_stages, LEAN_HOMES))
    return tuple(f"zero{stage}-{home}" for stages, homes in kinds for stage in stages for home in homes)


def memory_cases(size: Size) -> Iterator[str]:
    """Yield model/method for each combination."""
    methods = ("full", *(f"exploit-{percent}" for percent in size.percentages), LORA)
    yield from (f"{model}/{method}" for model in size.models for method in methods)


def time_cases(size: Size) -> Iterator[str]:
    """Yield model/row for what is timed against plain DeepSpeed."""
    chosen = [f"{phase}-{percent}" for percent in size.percentages for phase in ("exploit", "explore")]
    yield from (f"{size.models[0]}/{row}" for row in (*chosen[:2], "torch", LORA, *chosen[2:]))


def traces(size: Size) -> Iterator[str]:
    """Yield model/phase for the steps to profile."""
    yield from (f"{size.models[0]}/{phase}" for phase in ("exploit", "explore"))


def transfers(size: Size) -> tuple[str, ...]:
    """Return the rates to measure, model/percent for steps whose waits are compared with the model, and its table."""
    return ("rates", *(f"{size.models[0]}/{percent}" for percent in size.percentages), "table")


def _benchmark(size: Size, output: Path) -> tuple[str, ...]:
    return (
        sys.executable, "launch/benchmark.py", "--stage", "2", "--offload", "none", "--precision", "bf16",
        "--rows", "plain", "exploit-20", "visit-20", "floor-20", "--steps", str(size.steps), *size.shape,
        "--micro-batch", str(size.micro_batch), "--sequence-length", str(size.sequence_length),
        "--output", str(output / "benchmark"),
    )  # fmt: skip


def _finetune(output: Path) -> tuple[str, ...]:
    return (
        "deepspeed", "--num_accelerators", "1", "launch/train.py",
        "--deepspeed_config", "configs/zero2_states_visit.json",
        "--model", "smollm2", "--dataset", "builtin", "--builtin-level", "1", "--system", "", "--train-rows", "640",
        "--validation-rows", "32", "--test-rows", "50", "--max-new-tokens", "32", "--output", str(output / "smollm2"),
        "--overwrite",
    )  # fmt: skip
