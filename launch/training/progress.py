"""The progress of a run, which a checkpoint carries beside the engine's own state."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_agsel.errors import CheckpointError

STATE = "launch_train"  # our key in a checkpoint's client_state


@dataclass
class Progress:
    """Counters and results so far.

    Attributes:
        first_step: the step that this process began with; above 0 in a resumed run.
        validation: (steps done, loss) of each evaluation.
        log_lines: lines of metrics.jsonl that belong to the steps done.
        processor_seconds: of all steps, those before a resume included.
    """

    step: int = 0
    first_step: int = 0
    exact_before: float | None = None
    exact_after: float | None = None
    validation: list[tuple[int, float]] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    nonfinite_in_a_row: int = 0
    log_lines: int = 0
    processor_seconds: float = 0.0

    def state(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's client_state, with the ``position`` that a resumed run must match."""
        return {
            STATE: {
                "step": self.step,
                "log_lines": self.log_lines,
                "position": dict(position),
                "exact_before": self.exact_before,
                "validation": self.validation,
                "train_losses": self.train_losses,
                "nonfinite_in_a_row": self.nonfinite_in_a_row,
                "processor_seconds": self.processor_seconds,
            }
        }


def from_checkpoint(checkpoint: Path, client_state: Mapping[str, Any], position: Mapping[str, Any]) -> Progress:
    """Return the progress saved in ``checkpoint``. Raises CheckpointError unless it is this run's."""
    state = client_state.get(STATE)
    if state is None:
        raise CheckpointError(f"{checkpoint} was not written by launch/train.py. Start without --resume.")
    for name, here in position.items():
        there = state["position"][name]
        if there != here:
            raise CheckpointError(
                f"{checkpoint} was written by a run with {name} {there}; this one has {here}. "
                "Resume with the same settings, or start anew in another --output."
            )
    return Progress(
        step=state["step"],
        first_step=state["step"],
        exact_before=state["exact_before"],
        validation=[(step, loss) for step, loss in state["validation"]],
        train_losses=list(state["train_losses"]),
        nonfinite_in_a_row=state["nonfinite_in_a_row"],
        log_lines=state["log_lines"],
        processor_seconds=state.get("processor_seconds", 0.0),
    )


def position_of(options: argparse.Namespace, *, rows: int, rows_per_step: int, total_steps: int) -> dict[str, Any]:
    """Return the settings that must be equal for the data to go on where it stopped."""
    return {
        "dataset": options.dataset,
        "seed": options.seed,
        "training rows": rows,
        "rows per step": rows_per_step,
        "total steps": total_steps,
    }
