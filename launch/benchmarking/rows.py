"""The rows of the benchmark: their names, and what each is as a section of a ds_config.

[Note: Steady state] The first step of every row is on all blocks, so that all Adam states exist before anything
is measured. Otherwise a short run would count, in nearly every step, what happens once in a long one: the first
update of a block, which allocates its states.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from ds_agsel import policies
from ds_agsel.gast_section import GAST
from ds_agsel.policies.adagrad_select import AdaGradSelect
from ds_agsel.sparse_grad_section import SPARSE_GRAD

PERCENTAGES = (10, 20, 30)
FLOOR_PERCENT = 20
PLAIN = "plain"
ALL = "all"
FLOOR = f"floor-{FLOOR_PERCENT}"
VISIT = f"visit-{FLOOR_PERCENT}"
# Rows that learn from half of the batch's rows: the row that they are compared with, and how they draw.
GAST_ROWS = {
    f"random-{FLOOR_PERCENT}": (f"exploit-{FLOOR_PERCENT}", "random"),
    f"align-{FLOOR_PERCENT}": (f"exploit-{FLOOR_PERCENT}", "sample"),
    f"random-{ALL}": (ALL, "random"),
    f"align-{ALL}": (ALL, "sample"),
}
# Rows with `sparse_grad`, and the row that they are compared with.
SPARSE_ROWS = {f"sparse-{FLOOR_PERCENT}": f"exploit-{FLOOR_PERCENT}", f"sparse-{ALL}": ALL}
# Rows that are measured where they are named, and what they are compared with.
NAMED_ROWS = {**{row: base for row, (base, _) in GAST_ROWS.items()}, **SPARSE_ROWS}
MODULES_PERCENT = 3
MODULES = f"modules-{MODULES_PERCENT}"
# The same layers of the model, as blocks and matrix by matrix: what the number of units costs.
LAYERS = f"layers-{FLOOR_PERCENT}"
MATRICES = f"matrices-{FLOOR_PERCENT}"
UNIT_ROWS = (MODULES, LAYERS, MATRICES)


def exploit_row(percent: int) -> str:
    """Return the name of the row of exploit steps at ``percent``."""
    return f"exploit-{percent}"


def explore_row(percent: int) -> str:
    """Return the name of the row of explore steps at ``percent``."""
    return f"explore-{percent}"


@policies.register("benchmark")
class WarmAdaGradSelect(AdaGradSelect):
    """`adagrad_select` after one step on every block. [Note: Steady state]."""

    _plans_all = False  # until the first plan: what memory is sized by is a step of the row
    _asked: tuple[int, list[int]] | None = None  # with what arguments `_answer` was planned
    _answer: tuple[int, ...] | None = None

    @property
    def max_selected(self) -> int:
        """All blocks in step 0, which memory is not sized by: its states pass through."""
        return self.context.num_blocks if self._plans_all else super().max_selected

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        """Return every block at step 0, and AdaGradSelect's plan from step 1 on.

        A policy from outside ds_agsel is asked twice (policies/answers.py), which AdaGradSelect is not: the second
        answer is the first.
        """
        self._plans_all = step == 0
        if step == 0:
            return tuple(range(self.context.num_blocks))
        asked = step, list(update_counts)
        if asked != self._asked:
            self._asked, self._answer = asked, super().plan(step, update_counts)
        return self._answer


@policies.register("benchmark_layers")
class Layers(policies.Policy):
    """Random layers, as blocks or with all of their matrices; every unit at step 0. [Note: Steady state]."""

    def __init__(self, context: policies.PolicyContext) -> None:
        super().__init__(context)
        layer_of = [re.search(r"layers\.(\d+)", name) for name in context.block_names]
        self._layer_of = [None if found is None else int(found[1]) for found in layer_of]
        self._layers = sorted({layer for layer in self._layer_of if layer is not None})

    @property
    def max_selected(self) -> int:
        """All units, which memory is sized by."""
        return self.context.num_blocks

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        """Return the units of layers that hang on seed and step alone."""
        count = max(1, len(self._layers) * FLOOR_PERCENT // 100)
        drawn = random.Random(f"{self.context.config.seed} {step}").sample(self._layers, count)
        return tuple(unit for unit, layer in enumerate(self._layer_of) if step == 0 or layer in drawn)


def section(row: str) -> dict[str, Any] | None:
    """Return the ``adagrad_select`` section of a row that DeepSpeed runs; None for plain DeepSpeed."""
    if row == PLAIN:
        return None
    if row == ALL:
        return {"policy": "all"}
    if row in GAST_ROWS:
        base, draw = GAST_ROWS[row]
        return {**(section(base) or {}), GAST: {"draw": draw}}
    if row in UNIT_ROWS:
        rest = {"explore_rate": 0, "select_percent": MODULES_PERCENT if row == MODULES else FLOOR_PERCENT}
        granularity = "block" if row == LAYERS else "module"
        return {"policy": "benchmark" if row == MODULES else "benchmark_layers", "granularity": granularity, **rest}
    if row in SPARSE_ROWS:
        return {**(section(SPARSE_ROWS[row]) or {}), SPARSE_GRAD: {"refresh_steps": None}}
    phase, percent = row.split("-")
    if phase == "exploit":
        return {"policy": "benchmark", "select_percent": int(percent), "explore_rate": 0}
    if row == VISIT:
        return {**(section(exploit_row(FLOOR_PERCENT)) or {}), "step_device": "accelerator"}
    every_step = {"explore_rate": 1, "explore_decay": 0, "steps_per_epoch": 1_000_000_000}
    return {"policy": "benchmark", "select_percent": int(percent), **every_step}
