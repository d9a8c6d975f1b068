"""What a run leaves behind: logs, the final model, a summary for programs and one for people."""

from __future__ import annotations

import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch
import transformers
from safetensors import SafetensorError

import ds_agsel
from ds_agsel.errors import CheckpointError
from ds_agsel.selection import Traffic


def save_model(model: Any, state_dict: Mapping[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    """Write ``folder`` for ``from_pretrained``: weights, tokenizer, generation config. Replaces it whole."""
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    try:
        model.save_pretrained(building, state_dict=state_dict)
        tokenizer.save_pretrained(building)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two from those who write tensors
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(
            f"The model could not be written to {folder}: {error}. Make room, then --resume."
        ) from error


def versions() -> dict[str, str]:
    """What the run's results hang on."""
    modules = (ds_agsel, deepspeed, torch, transformers, datasets)
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


def step_seconds(records: Sequence[Mapping[str, Any]], quantile: float) -> dict[str, float]:
    """A quantile of a step's seconds, 0.5: the median, over all and by phase."""
    by_phase: dict[str, list[float]] = {"all": [record["seconds"] for record in records]}
    for record in records:
        by_phase.setdefault(record["phase"], []).append(record["seconds"])
    return {phase: float(np.quantile(values, quantile)) for phase, values in by_phase.items() if values}


def selection_summary(selection: Any | None) -> dict[str, Any] | None:
    """Shares and traffic of the whole run; None for plain DeepSpeed.

    Shares are means over the steps. Traffic is rank 0's mean per step since this process began, which for a
    resumed run is later than the run's.
    """
    if selection is None:
        return None
    blocks, history, traffic = selection.blocks, selection.history, selection.traffic
    total_numel = sum(block.numel for block in blocks)
    stepped = [sum(blocks[index].numel for index in record.blocks) for record in history]
    counters = [counter.name for counter in fields(Traffic) if counter.name != "step"]
    return {
        "policy": selection.config.policy,
        "blocks": len(blocks),
        "update_counts": {block.name: count for block, count in zip(blocks, selection.update_counts)},
        "explore_steps": sum(record.phase == "explore" for record in history),
        "exploit_steps": sum(record.phase == "exploit" for record in history),
        "share_of_blocks": _mean([len(record.blocks) / len(blocks) for record in history]),
        "share_of_parameters": _mean([numel / total_numel for numel in stepped]),
        "traffic_per_step": {name: _mean([getattr(step, name) for step in traffic]) for name in counters},
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def table(summary: Mapping[str, Any]) -> str:
    """The summary for people: two columns of text."""
    loss, match, time = summary["loss"], summary["exact_match_percent"], summary["step_seconds"]
    rows = [
        ("method", summary["method"]),
        ("model, data", f"{summary['model']}, {summary['dataset']}"),
        ("steps", f"{summary['steps']} of {summary['rows_per_step']} rows, {summary['precision']}"),
        ("training loss", f"{_number(loss['train_first'])} -> {_number(loss['train_last'])}"),
        ("validation loss", f"{_number(loss['validation_first'])} -> {_number(loss['validation_last'])}"),
        ("exact match (test)", f"{_number(match['before'], 1)} % -> {_number(match['after'], 1)} %"),
        ("seconds a step", ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in time.items()) or "-"),
        ("tokens a second", _number(summary["tokens_per_second"], 0)),
        ("peak memory", f"{_bytes(summary['peak_memory_bytes']['host'])} host, "
                        f"{_bytes(summary['peak_memory_bytes']['accelerator'])} accelerator"),
        ("held at most", f"{_bytes(summary['optimizer_state_bytes'])} optimizer states, "
                         f"{_bytes(summary['master_weight_bytes'])} master weights, "
                         f"{_bytes(summary['gradient_bytes'])} gradients"),
    ]  # fmt: skip
    chosen = summary["selection"]
    if chosen is not None and chosen["share_of_blocks"] is not None:
        per_step = chosen["traffic_per_step"]
        rows += [
            ("selection", f"{chosen['policy']}, {chosen['blocks']} blocks, "
                          f"{chosen['explore_steps']} explore and {chosen['exploit_steps']} exploit steps"),
            ("share updated", f"{100 * chosen['share_of_blocks']:.1f} % of blocks, "
                              f"{100 * chosen['share_of_parameters']:.1f} % of parameters"),
        ]  # fmt: skip
        if per_step["stepped_numel"] is not None:
            moved = ", ".join(
                f"{name.removesuffix('_bytes')} {_bytes(value)}"
                for name, value in per_step.items()
                if name.endswith("_bytes")
            )
            rows += [
                ("traffic a step", moved),
                ("stepped a step", f"{per_step['stepped_numel']:,.0f} elements"),
            ]
    data = summary["data"]
    rows += [
        (
            "truncated rows",
            f"{data['cut_rows']} ({data['cut_numel']} tokens), {data['dropped_rows']} dropped",
        ),
        ("processor", f"{summary['processor']['name']} ({summary['processor']['simd']})"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]
    rows += [("fault", sentence) for sentence in summary["faults"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
