"""The summary of a run: one dict for programs (summary.json), one table for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from deepspeed import comm as dist

from ds_agsel import processor
from ds_agsel.report.text import bytes_text
from ds_agsel.selection import Traffic

from .. import versions
from ..texts import number_text
from .assembly import Assembly
from .costs import Costs
from .progress import Progress

# Which figures a resumed run has of all its steps, and which of those since it was resumed.
_OF_ALL_STEPS = ("loss", "processor_seconds", "exact_match_percent", "selection")
_OF_THIS_PROCESS = (
    "seconds", "step_seconds", "step_seconds_p90", "tokens_per_second", "peak_memory_bytes", "optimizer_state_bytes",
    "master_weight_bytes", "gradient_bytes", "faults", "selection.traffic_per_step",
)  # fmt: skip
_SINCE_RESUMED = (
    "seconds a step",
    "tokens a second",
    "peak memory",
    "held at most",
    "traffic a step",
    "stepped a step",
    "fault",
)


class Summary:
    """Collects the steps' records of one process.

    ``began`` is the time.monotonic() at which the process began with the run.
    """

    def __init__(self, assembly: Assembly, progress: Progress, costs: Costs, began: float) -> None:
        self._run = assembly
        self._progress = progress
        self._costs = costs
        self._began = began
        self._records: list[Mapping[str, Any]] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Remember a step's record, as metrics.jsonl has it."""
        self._records.append(record)

    def of_the_run(self, peak_memory_bytes: Mapping[str, int]) -> dict[str, Any]:
        """Return the summary, in JSON's types.

        ``steps_of`` has the first and the last step that each figure is of: in a resumed run some are of all steps,
        others of those since the resume.
        """
        run, progress, costs = self._run, self._progress, self._costs
        train, options = run.data.train, run.options
        seconds = sum(record["seconds"] for record in self._records)
        plain = "full" if run.selection is None else "adagrad_select"
        losses, validation = progress.train_losses, progress.validation
        return {
            "method": options.method or plain,
            "method_options": dict(run.method.options),
            "model": options.model,
            "dataset": options.dataset,
            "deepspeed_config": options.deepspeed_config,
            "ranks": dist.get_world_size(),
            "precision": run.precision,
            "steps": progress.step,
            "steps_of": self._steps_of(),
            "rows_per_step": run.data.batching.rows_per_step,
            "loss": {
                "train_first": losses[0] if losses else None,
                "train_last": losses[-1] if losses else None,
                "validation_first": validation[0][1] if validation else None,
                "validation_last": validation[-1][1] if validation else None,
            },
            "exact_match_percent": {"before": progress.exact_before, "after": progress.exact_after},
            "seconds": time.monotonic() - self._began,
            "processor_seconds": costs.processor_seconds,
            "step_seconds": step_seconds(self._records, 0.5),
            "step_seconds_p90": step_seconds(self._records, 0.9),
            "tokens_per_second": sum(r["tokens"] for r in self._records) / seconds if seconds else None,
            "peak_memory_bytes": dict(peak_memory_bytes),
            **costs.largest,
            "faults": run.method.faults() + (run.watch.sentences() if run.watch is not None else []),
            "selection": selection_summary(run.selection),
            "data": {
                "training_rows": len(train.rows),
                "cut_rows": train.cut_rows,
                "cut_numel": train.cut_numel,
                "dropped_rows": train.dropped_rows,
            },
            "versions": versions.of_a_run(),
            "processor": processor.describe(),
        }

    def _steps_of(self) -> dict[str, list[int] | None]:
        """Return [first, last] step of each figure about steps; None if it covers no step."""
        first, done = self._progress.first_step, self._progress.step
        whole = [0, done - 1] if done else None
        here = [first, done - 1] if done > first else None
        return {**dict.fromkeys(_OF_ALL_STEPS, whole), **dict.fromkeys(_OF_THIS_PROCESS, here)}


def step_seconds(records: Sequence[Mapping[str, Any]], quantile: float) -> dict[str, float]:
    """Return a quantile of a step's seconds, 0.5: the median, over all and by phase."""
    by_phase: dict[str, list[float]] = {"all": [record["seconds"] for record in records]}
    for record in records:
        by_phase.setdefault(record["phase"], []).append(record["seconds"])
    return {phase: float(np.quantile(values, quantile)) for phase, values in by_phase.items() if values}


def selection_summary(selection: Any | None) -> dict[str, Any] | None:
    """Return shares and traffic of the whole run; None for plain DeepSpeed.

    Shares are means over the steps. Traffic is rank 0's mean per step since this process began, which for a
    resumed run is later than the run's.
    """
    if selection is None:
        return None
    blocks, counts, steps = selection.blocks, selection.update_counts, selection.num_steps
    total_numel = sum(block.numel for block in blocks)
    stepped_numel = sum(count * block.numel for count, block in zip(counts, blocks))
    counters = [counter.name for counter in fields(Traffic) if counter.name != "step"]
    return {
        "policy": selection.config.policy,
        "blocks": len(blocks),
        "update_counts": {block.name: count for block, count in zip(blocks, counts)},
        "explore_steps": selection.steps_by_phase["explore"],
        "exploit_steps": selection.steps_by_phase["exploit"],
        "share_of_blocks": sum(counts) / len(blocks) / steps if steps else None,
        "share_of_parameters": stepped_numel / total_numel / steps if steps else None,
        "traffic_per_step": selection.mean_traffic or dict.fromkeys(counters),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary for people: two columns of text.

    Figures of a resumed run that do not cover all its steps say which steps they cover.
    """
    since = _since(summary["steps_of"]["step_seconds"])
    loss, match, data = summary["loss"], summary["exact_match_percent"], summary["data"]
    by_phase = summary["step_seconds"].items()
    rows = [
        ("method", summary["method"]),
        ("model, data", f"{summary['model']}, {summary['dataset']}"),
        ("steps", f"{summary['steps']} of {summary['rows_per_step']} rows, {summary['precision']}"),
        ("training loss", _change(loss["train_first"], loss["train_last"])),
        ("validation loss", _change(loss["validation_first"], loss["validation_last"])),
        ("exact match (test)", _change(match["before"], match["after"], 1, " %")),
        ("seconds a step", ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in by_phase) or "-"),
        ("tokens a second", number_text(summary["tokens_per_second"], 0, "-")),
        ("peak memory", f"{bytes_text(summary['peak_memory_bytes']['host'])} host, "
                        f"{bytes_text(summary['peak_memory_bytes']['accelerator'])} accelerator"),
        ("held at most", f"{_held(summary, 'optimizer_state_bytes')} optimizer states, "
                         f"{_held(summary, 'master_weight_bytes')} master weights, "
                         f"{_held(summary, 'gradient_bytes')} gradients"),
        *_selection_rows(summary["selection"]),
        ("truncated rows", f"{data['cut_rows']} ({data['cut_numel']} tokens), {data['dropped_rows']} dropped"),
        ("processor", f"{summary['processor']['name']} ({summary['processor']['simd']})"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
        *(("fault", sentence) for sentence in summary["faults"]),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}{since if name in _SINCE_RESUMED else ''}" for name, text in rows)


def _held(summary: Mapping[str, Any], name: str) -> str:
    return bytes_text(summary[name]) if name in summary else "-"  # none: resumed after its last step


def _change(before: float | None, after: float | None, digits: int = 3, unit: str = "") -> str:
    return f"{number_text(before, digits, '-')}{unit} -> {number_text(after, digits, '-')}{unit}"


def _since(steps: Sequence[int] | None) -> str:
    """Return the remark on figures that cover only a resumed run's last process."""
    if steps is None:
        return " (no step since it was resumed)"
    return f" (steps {steps[0]} to {steps[1]}, since it was resumed)" if steps[0] else ""


def _selection_rows(chosen: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if chosen is None or chosen["share_of_blocks"] is None:
        return []
    rows = [
        ("selection", f"{chosen['policy']}, {chosen['blocks']} blocks, "
                      f"{chosen['explore_steps']} explore and {chosen['exploit_steps']} exploit steps"),
        ("share updated", f"{100 * chosen['share_of_blocks']:.1f} % of blocks, "
                          f"{100 * chosen['share_of_parameters']:.1f} % of parameters"),
    ]  # fmt: skip
    per_step = chosen["traffic_per_step"]
    if per_step["stepped_numel"] is not None:
        moved = {name.removesuffix("_bytes"): value for name, value in per_step.items() if name.endswith("_bytes")}
        rows += [
            ("traffic a step", ", ".join(f"{name} {bytes_text(value)}" for name, value in moved.items())),
            ("stepped a step", f"{per_step['stepped_numel']:,.0f} elements"),
        ]
    return rows
