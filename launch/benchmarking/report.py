"""The results of the benchmark's samples: medians, ratios within a round, bars, and a table. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from ..texts import MIB, aligned
from .processes import Workload
from .rows import (
    ALL,
    FLOOR,
    FLOOR_PERCENT,
    GAST_ROWS,
    LAYERS,
    MATRICES,
    MODULES,
    PERCENTAGES,
    PLAIN,
    SPARSE_ROWS,
    VISIT,
    exploit_row,
    explore_row,
)

PHASES = ("forward", "backward", "optimizer")
ZERO_ALIGNMENT_NUMEL = 2  # DeepSpeed pads a rank's flat partition to 4 bytes of 2-byte elements (stage_1_and_2.py)

UNITS_LIMIT = 1.03  # of a step with over 200 units, over one with the same parameters in 32 blocks
RANDOM_ROWS_LIMIT, ALIGNED_ROWS_LIMIT, ALIGNED_ROWS_OF_ALL_LIMIT = 1.03, 1.35, 1.5
SPARSE_LIMIT, SPARSE_ALL_LIMIT = 1.10, 1.15
CALIBRATION_STEPS_LIMIT = 20  # calibration takes at most as long as so many steps

Sample = Mapping[str, Any]
Samples = Mapping[int, Sample]  # by round


@dataclass(frozen=True)
class Bar:
    """A promise about a number: met where ``value`` is at most ``limit``.

    Attributes:
        processor: the same by processor seconds, which a machine that others use too disturbs less; not judged. None
            where no time is measured.
    """

    name: str
    limit: float
    value: float
    processor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return the bar in JSON's types."""
        return {**asdict(self), "met": self.met}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles around it."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def step_seconds(sample: Sample) -> float:
    """Return the seconds of the whole step."""
    return sum(sample["seconds"].values())


def step_cpu_seconds(sample: Sample) -> float:
    """Return the processor seconds of the step's phases."""
    return float(sum(sample["cpu_seconds_of"].values()))


def optimizer_seconds(sample: Sample) -> float:
    """Return the seconds of the optimizer's part of the step."""
    return float(sample["seconds"]["optimizer"])


def optimizer_cpu_seconds(sample: Sample) -> float:
    """Return the processor seconds of the optimizer's part of the step."""
    return float(sample["cpu_seconds_of"]["optimizer"])


def ratios(row: Samples, base: Samples, seconds: Callable[[Sample], float]) -> list[float]:
    """``row`` over ``base`` in each round that has both: they met the same noise."""
    return [seconds(row[number]) / seconds(base[number]) for number in sorted(row.keys() & base.keys())]


def share(sample: Sample, block_numels: Sequence[int]) -> float:
    """Return updated parameters / all parameters."""
    return float(sample["updated_numel"] / sum(block_numels))


def gradient_bytes(sample: Sample) -> int:
    """Return the bytes of gradients on accelerator and host."""
    return int(sample["accelerator_gradient_bytes"] + sample["host_gradient_bytes"])


def expected_gradient_bytes(blocks: Sequence[int], block_numels: Sequence[int], workload: Workload) -> int:
    """Return the bytes of the gradients of ``blocks`` alone, with ZeRO's alignment of each block's partition.

    fp32 on the host with offload, the model's precision on the accelerator without. ZeRO-3's offload keeps both, the
    sum in the model's precision on the host too, and it pads nothing on one rank.
    """
    precise = 4 if workload.precision == "fp32" else 2
    if workload.stage == 3:
        itemsize = precise + 4 if workload.offload == "cpu" else precise
        return sum(block_numels[block] for block in blocks) * itemsize
    itemsize = 4 if workload.offload == "cpu" else precise
    aligned = [math.ceil(block_numels[block] / ZERO_ALIGNMENT_NUMEL) * ZERO_ALIGNMENT_NUMEL for block in blocks]
    return sum(aligned) * itemsize


def summarize(samples: Mapping[str, Samples], block_numels: Sequence[int], tokens: int) -> dict[str, dict[str, Any]]:
    """Return each row's numbers: seconds by phase, ratios, memory, traffic."""
    rows = {}
    for name, by_round in samples.items():
        steps = list(by_round.values())
        shares = [share(sample, block_numels) for sample in steps]
        step = spread([step_seconds(sample) for sample in steps])
        rows[name] = {
            "steps": len(steps),
            "seconds": {
                **{phase: spread([sample["seconds"][phase] for sample in steps]) for phase in PHASES},
                "step": step,
                "cpu": spread([sample["cpu_seconds"] for sample in steps]),
            },
            "tokens_per_second": tokens / step["median"],
            "step_to_plain": spread(ratios(by_round, samples[PLAIN], step_seconds)),
            "optimizer_to_plain": spread(ratios(by_round, samples[PLAIN], optimizer_seconds)),
            "share": {"mean": statistics.fmean(shares), "min": min(shares), "max": max(shares)},
            "gradient_bytes": {
                place: spread([sample[f"{place}_gradient_bytes"] for sample in steps])
                for place in ("accelerator", "host")
            },
            "state_bytes": max(sample["state_bytes"] for sample in steps),
            "peak_bytes": steps[-1].get("peak_bytes"),  # None where rows share a process
            "traffic": _mean_traffic(steps),
        }
    return rows


def _mean_traffic(steps: Sequence[Sample]) -> dict[str, float] | None:
    """Return the mean per step; None for rows without counts."""
    if "traffic" not in steps[0]:
        return None
    names = [name for name in steps[0]["traffic"] if name != "step"]
    return {name: statistics.fmean(sample["traffic"][name] for sample in steps) for name in names}


def bars(samples: Mapping[str, Samples], block_numels: Sequence[int], workload: Workload) -> list[Bar]:
    """Return the bars that can be judged by the measured rows. All ratios are medians of the rounds' ratios."""
    found = []

    def bar(name: str, limit: float, row: str, base: str) -> None:
        if row in samples and base in samples:
            value, processor = (
                statistics.median(ratios(samples[row], samples[base], seconds))
                for seconds in (step_seconds, step_cpu_seconds)
            )
            found.append(Bar(name, limit, value, processor))

    main = exploit_row(FLOOR_PERCENT)
    bar(f"{main} step / plain step", 0.70 if workload.stage == 2 else 0.75, main, PLAIN)
    if workload.stage == 2:  # the floor gathers no weights
        bar(f"{main} step / {FLOOR} step", 1.08, main, FLOOR)
    for row in (*(exploit_row(percent) for percent in PERCENTAGES), MODULES):
        if row in samples:
            found.append(_optimizer_bar(row, samples, block_numels))
    bar(f"{MATRICES} step / {LAYERS} step", UNITS_LIMIT, MATRICES, LAYERS)
    bar(f"policy {ALL} step / plain step", 1.02, ALL, PLAIN)
    for row in (explore_row(percent) for percent in PERCENTAGES):
        bar(f"{row} step / plain step", 1.03, row, PLAIN)
    for row in (exploit_row(percent) for percent in PERCENTAGES):
        if row in samples:
            worst = max(
                gradient_bytes(sample) / expected_gradient_bytes(sample["blocks"], block_numels, workload)
                for sample in samples[row].values()
            )
            found.append(Bar(f"{row} gradient bytes / bytes of the selected blocks", 1.0, worst))
    if workload.stage == 2:
        for row in (explore_row(percent) for percent in PERCENTAGES):
            if row in samples:
                found.append(_streaming_bar(row, samples[row], block_numels, workload))
    for row, (base, draw) in GAST_ROWS.items():
        aligned_limit = ALIGNED_ROWS_OF_ALL_LIMIT if base == ALL else ALIGNED_ROWS_LIMIT
        bar(f"{row} step / {base} step", RANDOM_ROWS_LIMIT if draw == "random" else aligned_limit, row, base)
    for row, base in SPARSE_ROWS.items():
        bar(f"{row} step / {base} step", SPARSE_ALL_LIMIT if base == ALL else SPARSE_LIMIT, row, base)
        if row in samples and base in samples:
            found += _processor_bars(row, base, samples)
    if VISIT in samples:
        found += _visiting_bars(samples[VISIT], block_numels)
    return found


def _processor_bars(row: str, base: str, samples: Mapping[str, Samples]) -> list[Bar]:
    """Return the bars of a row with `sparse_grad` in processor time, in which calibration's is told."""

    def seconds(sample: Sample) -> float:
        return float(sample["cpu_seconds"])

    limit = SPARSE_ALL_LIMIT if base == ALL else SPARSE_LIMIT
    value = statistics.median(ratios(samples[row], samples[base], seconds))
    found = [Bar(f"{row} step / {base} step, processor time", limit, value)]
    if base == ALL:
        calibration = next(iter(samples[row].values()))["calibration_cpu_seconds"]
        step = statistics.median(map(seconds, samples[base].values()))
        found.append(
            Bar(f"{row} calibration / {base} step, processor time", CALIBRATION_STEPS_LIMIT, calibration / step)
        )
    return found


def _streaming_bar(row: str, by_round: Samples, block_numels: Sequence[int], workload: Workload) -> Bar:
    """Return the peak of gradient bytes over the bytes of the k + 1 largest blocks."""
    sample = next(iter(by_round.values()))
    largest = sorted(range(len(block_numels)), key=lambda block: -block_numels[block])[: len(sample["blocks"]) + 1]
    on_device = replace(workload, offload="none")
    allowed = expected_gradient_bytes(largest, block_numels, on_device)
    if workload.offload == "cpu":  # what is kept lies on the host, in fp32, and one block on the accelerator
        allowed = expected_gradient_bytes(largest[:-1], block_numels, workload)
        allowed += expected_gradient_bytes(largest[:1], block_numels, on_device)
    most = max(sample["most_gradient_bytes"] for sample in by_round.values())
    return Bar(f"{row} most gradient bytes / bytes of the k + 1 largest blocks", 1.0, most / allowed)


def _visiting_bars(by_round: Samples, block_numels: Sequence[int]) -> list[Bar]:
    """Return exploit steps' resident and moved bytes over those of the selections, and planning over the step."""

    def state_bytes(blocks: Iterable[int]) -> int:
        aligned = [math.ceil(block_numels[block] / ZERO_ALIGNMENT_NUMEL) * ZERO_ALIGNMENT_NUMEL for block in blocks]
        return 12 * sum(aligned)

    steps = [by_round[number] for number in sorted(by_round)]
    resident = [abs(step["resident_state_bytes"] / state_bytes(step["blocks"]) - 1) for step in steps]
    moved = []
    for before, after in pairwise(steps):
        changed = set(before["blocks"]) ^ set(after["blocks"])
        moved.append(abs(after["traffic"]["h2d_bytes"] + after["traffic"]["d2h_bytes"] - state_bytes(changed)))
    planning = statistics.median(step["planning_seconds"] / step_seconds(step) for step in steps)
    return [
        Bar(f"{VISIT} resident state bytes, off 12 bytes an element selected", 0.0, max(resident)),
        Bar(f"{VISIT} bytes moved, off the states of the blocks that changed", 0.0, max(moved, default=0)),
        Bar(f"{VISIT} planning / step", 0.01, planning),
    ]


def _optimizer_bar(row: str, samples: Mapping[str, Samples], block_numels: Sequence[int]) -> Bar:
    """Return the optimizer seconds over plain's, less the round's share, which differs from draw to draw."""
    by_round, plain = samples[row], samples[PLAIN]
    rounds = sorted(by_round.keys() & plain.keys())
    value, processor = (
        statistics.median(
            seconds(by_round[number]) / seconds(plain[number]) - share(by_round[number], block_numels)
            for number in rounds
        )
        for seconds in (optimizer_seconds, optimizer_cpu_seconds)
    )
    return Bar(f"{row} optimizer / plain optimizer - share", 0.03, value, processor)


def table(mode: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows for a terminal. Seconds are medians; ± is half the distance between the quartiles."""
    head: tuple[str, ...] = (
        "row",
        "share",
        "forward",
        "backward",
        "optimizer",
        "step",
        "±",
        "/ plain",
        "opt / plain",
        "tokens/s",
    )
    head += ("peak", "grads acc.", "grads host", "states", "D2H", "H2D", "stepped")
    lines = [head]
    for name, row in rows.items():
        seconds, traffic = row["seconds"], row["traffic"]
        step = seconds["step"]
        lines.append(
            (
                name,
                f"{row['share']['mean']:.1%}",
                *(f"{seconds[phase]['median']:.3f}" for phase in PHASES),
                f"{step['median']:.3f}",
                f"{(step['q3'] - step['q1']) / 2:.3f}",
                f"{row['step_to_plain']['median']:.3f}",
                f"{row['optimizer_to_plain']['median']:.3f}",
                f"{row['tokens_per_second']:.0f}",
                _mib(max(row["peak_bytes"].values())) if row["peak_bytes"] else "-",
                _mib(row["gradient_bytes"]["accelerator"]["median"]),
                _mib(row["gradient_bytes"]["host"]["median"]),
                _mib(row["state_bytes"]),
                _mib(traffic["d2h_bytes"]) if traffic else "-",
                _mib(traffic["h2d_bytes"]) if traffic else "-",
                f"{traffic['stepped_numel'] / 1e6:.1f} M" if traffic else "-",
            )
        )
    title = f"\n{mode}: seconds; MiB; D2H, H2D and elements stepped per step"
    if any(row["peak_bytes"] is None for row in rows.values()):
        title += "; no peak of rows that share a process"
    return "\n".join([title, *aligned(lines)])


def bar_table(mode: str, judged: Sequence[Bar]) -> str:
    """Return the bars for a terminal."""
    lines = [("bar", "limit", "measured", "by processor time", "")]
    for bar in judged:
        processor = "-" if bar.processor is None else f"{bar.processor:.3f}"
        lines.append((bar.name, f"{bar.limit:.2f}", f"{bar.value:.3f}", processor, "pass" if bar.met else "MISS"))
    return "\n".join([f"\nbars, {mode}", *aligned(lines)])


def _mib(count: float) -> str:
    return f"{count / MIB:.0f}"
