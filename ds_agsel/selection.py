"""The controller that an engine carries as ``engine.selection``: plan, choice, record.

One optimizer step passes through it as `choose` (explore steps, once the scores are known), `leave_out` (blocks
without a gradient) and `commit` or `skip`. It knows nothing of devices, ranks or ZeRO; freezing is the task of the
step's window (zero/window.py).

[Note: Rounds] A selection stands for `select_every` applied steps, a round. The policy is asked at the round's first
step; the others are planned here, as exploit steps on the same blocks, so that every policy is held alike. What a
step leaves out comes back with the next step of the round. A skipped step is in no round, and a step for which the
policy selects nothing begins none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch import nn

from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig, with_defaults
from ds_agsel.errors import CheckpointError, TrainingError
from ds_agsel.lottery import Bound, Lottery
from ds_agsel.metadata import STATE_VERSIONS, SelectionState, read_selection_state
from ds_agsel.policies import Policy, checked_choice, checked_plan
from ds_agsel.samples.record import Samples
from ds_agsel.sparse.record import SparseRecord

logger = logging.getLogger("ds_agsel")

Phase = Literal["explore", "exploit"]
# Records and traffic counters that are kept in memory and in checkpoints. The whole record is in selection.jsonl.
TAIL_STEPS = 1000


@dataclass(frozen=True)
class Plan:
    """What the next optimizer step will update. ``blocks`` is None until an explore step has its scores."""

    step: int
    phase: Phase
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class Round:
    """A selection that is held: the round's first step, and its blocks before any was left out; [Note: Rounds]."""

    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """An applied optimizer step: its index, its phase and the blocks it updated, ascending."""

    step: int
    phase: Phase
    blocks: tuple[int, ...]


@dataclass
class Traffic:
    """What one optimizer step moved on this rank, counted where it moved.

    ``reduced_bytes`` and ``gathered_bytes`` count the tensors handed to collectives (0 on one rank);
    ``d2h_bytes`` and ``h2d_bytes`` the copies between the model's device and the offloaded optimizer;
    ``nvme_read_bytes`` and ``nvme_written_bytes`` those between the host and states on NVMe, with the file's padding;
    ``stepped_numel`` the elements given to AdamW, with ZeRO's alignment padding.
    """

    step: int
    reduced_bytes: int = 0
    d2h_bytes: int = 0
    h2d_bytes: int = 0
    gathered_bytes: int = 0
    nvme_read_bytes: int = 0
    nvme_written_bytes: int = 0
    stepped_numel: int = 0


_COUNTERS = tuple(counter.name for counter in fields(Traffic) if counter.name != "step")


@dataclass
class Selection:
    """Which blocks are updated, at each optimizer step, and the record of it.

    Attributes:
        history: the last `TAIL_STEPS` applied steps, the newest last. `num_steps`, `steps_by_phase` and
            `update_counts` count all of them.
        sparse: with ``sparse_grad`` the matrices of which some entries are trained; else None.
        traffic: what each of the last `TAIL_STEPS` steps of this process moved; `mean_traffic` is of all of them.
        samples: which rows each block learned from, on this rank; None without `adagrad_select.gast`.
    """

    blocks: tuple[Block, ...]
    policy: Policy
    lottery: Lottery
    config: SelectionConfig
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    history: list[Record] = field(default_factory=list, init=False, repr=False)
    traffic: list[Traffic] = field(default_factory=list, init=False, repr=False)
    sparse: SparseRecord | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._counts = [0] * len(self.blocks)
        self._last_updates: list[int | None] = [None] * len(self.blocks)
        self._steps_by_phase: dict[Phase, int] = {"explore": 0, "exploit": 0}
        self._traffic_sums = dict.fromkeys(_COUNTERS, 0)
        self._traffic_steps = 0
        self._chosen: tuple[int, ...] | None = None
        self._left_out: frozenset[int] = frozenset()
        self._scores: dict[int, float] = {}
        self._times: list[float] | None = None
        self._round: Round | None = None
        self.current_traffic = Traffic(step=0)
        self.samples = None if self.config.gast is None else Samples(TAIL_STEPS)
        self._plan: Plan | None = None
        self._plan_ahead()

    @property
    def plan(self) -> Plan:
        """The next step's plan. Raises ConfigError if the policy has none, such as `replay` after its last step."""
        if self._plan is None:
            self._plan = self._draw_plan()
        return self._plan

    @property
    def planned_blocks(self) -> tuple[int, ...] | None:
        """The blocks that the next step will update, where they are known before it."""
        return None if self._plan is None else self._plan.blocks

    @property
    def bound(self) -> Bound:
        """The most that a step can update."""
        return self.lottery.bound(self.policy)

    @property
    def update_counts(self) -> tuple[int, ...]:
        """f: how many optimizer steps updated each block."""
        return tuple(self._counts)

    def missed_steps(self, block: int) -> int:
        """Return how many applied steps have passed without ``block`` since its last update; 0 if it had none."""
        last = self._last_updates[block]
        return 0 if last is None else self.num_steps - last - 1

    @property
    def num_steps(self) -> int:
        """How many optimizer steps were applied."""
        return sum(self._steps_by_phase.values())

    @property
    def steps_by_phase(self) -> Mapping[Phase, int]:
        """How many applied steps explored, and how many exploited."""
        return dict(self._steps_by_phase)

    @property
    def mean_traffic(self) -> dict[str, float] | None:
        """Each counter of `Traffic`, its mean over this process's applied steps; None before the first."""
        if not self._traffic_steps:
            return None
        return {name: total / self._traffic_steps for name, total in self._traffic_sums.items()}

    @property
    def explore_probability(self) -> float:
        """ε_t of the planned step; within a round that of its first step."""
        step = self.plan.step
        held = self._held(step)
        return self.policy.explore_probability(step if held is None else held.start)

    @property
    def active_blocks(self) -> tuple[int, ...]:
        """Blocks whose gradients this step needs: the selected ones, or before an explore step's choice all it has."""
        if self.plan.blocks is not None or self._chosen is not None:
            return self.selected_blocks
        return self.lottery.active

    @property
    def has_chosen(self) -> bool:
        """Whether the blocks of this step are known: planned, or chosen by an explore step."""
        return self._chosen is not None

    @property
    def selected_blocks(self) -> tuple[int, ...]:
        """Blocks that this step updates, ascending. Raises TrainingError before an explore step's choice."""
        if self._chosen is None:
            raise TrainingError(f"step {self.plan.step} explores: its blocks are chosen after backward.")
        if not self._left_out:  # asked for at every gradient
            return self._chosen
        return tuple(block for block in self._chosen if block not in self._left_out)

    def choose(self, scores: Sequence[float]) -> tuple[int, ...]:
        """Return an explore step's blocks: the policy's choice by ``scores`` (one per block) and `always_select`."""
        of_drawn = [scores[index] for index in self.lottery.drawn]
        step = self.plan.step
        nothing = self.policy.selects_nothing(step)
        self._chosen = self._with_always(() if nothing else checked_choice(self.policy, step, of_drawn))
        self.take_scores(self.lottery.drawn, scores)
        return self.selected_blocks

    @property
    def wants_scores(self) -> bool:
        """Whether the policy is to observe this step, and the step's scores have not been taken yet."""
        return self.policy.observes and not self._scores

    def take_scores(self, blocks: Collection[int], scores: Sequence[float]) -> None:
        """Keep ``scores`` (one per block) of ``blocks``, which the policy observes if the step is applied."""
        if self.policy.observes:
            self._scores = {block: scores[block] for block in blocks}

    def take_times(self, arrivals: Sequence[float]) -> None:
        """Keep the seconds that backward took to each block, which the policy sees if the step is applied."""
        self._times = list(arrivals)

    def leave_out(self, blocks: Collection[int]) -> None:
        """Take ``blocks`` out of this step: they are neither updated nor counted, though planned or chosen."""
        self._left_out |= set(blocks)

    def commit(self) -> Record:
        """Count and record the step that was applied and plan the next one."""
        record = Record(self.plan.step, self.plan.phase, self.selected_blocks)
        self._hold(record.step)
        self._observe(record.step)
        for index in record.blocks:
            self._counts[index] += 1
            self._last_updates[index] = record.step
        self._steps_by_phase[record.phase] += 1
        self.history.append(record)
        if self.samples is not None:
            self.samples.commit(record.step, record.blocks)
        self._count_traffic()
        for tail in (self.history, self.traffic):
            del tail[:-TAIL_STEPS]
        self._start_traffic()
        self._plan_ahead()
        return record

    def skip(self) -> None:
        """Forget a step that was not applied: no count, no record; its plan stands for the retry."""
        self._start_traffic()
        if self.samples is not None:
            self.samples.forget()
        self._forget_step()
        self._chosen = self.plan.blocks

    def _forget_step(self) -> None:
        self._left_out, self._scores, self._times = frozenset(), {}, None

    def _observe(self, step: int) -> None:
        """Show the policy the scores of the drawn blocks among those scored in this step; 0 for what it left out."""
        scores = {**dict.fromkeys(self._chosen or (), 0.0), **self._scores}
        places = {place: scores[block] for place, block in enumerate(self.lottery.drawn) if block in scores}
        seen = {place: score for place, score in places.items() if math.isfinite(score)}
        if self._times is not None:
            sunk = max((self._times[block] for block in self.lottery.always), default=0.0)
            self.policy.observe_times([self._times[block] for block in self.lottery.drawn], sunk)
        if seen and self.policy.observes:
            self.policy.observe(step, tuple(seen), tuple(seen.values()))

    def _hold(self, step: int) -> None:
        """Begin a round with the blocks of ``step``, if it was planned by the policy; [Note: Rounds]."""
        if self._held(step) is None:
            holds = self.config.select_every > 1 and not self.policy.selects_nothing(step)
            self._round = Round(step, self._chosen or ()) if holds else None

    def _held(self, step: int) -> Round | None:
        """Return the round that ``step`` belongs to; None for a step that the policy plans."""
        held = self._round
        return held if held is not None and held.start < step < held.start + self.config.select_every else None

    def _start_traffic(self) -> None:
        self.current_traffic = Traffic(step=self.num_steps)

    def _count_traffic(self) -> None:
        self.traffic.append(self.current_traffic)
        self._traffic_steps += 1
        for name in _COUNTERS:
            self._traffic_sums[name] += getattr(self.current_traffic, name)

    def _plan_ahead(self) -> None:
        """Draw the next plan. `plan` raises the errors of this: at the next step, when nothing has changed yet.

        Such errors are a policy that has run out of steps, an answer that can't be used, or what the policy raises.
        """
        self._plan = self._chosen = None
        self._forget_step()
        with suppress(Exception):
            self._plan = self._draw_plan()

    def _draw_plan(self) -> Plan:
        step = self.num_steps
        held = self._held(step)
        if held is not None:
            blocks: tuple[int, ...] | None = held.blocks
        else:
            drawn = checked_plan(self.policy, step, [self._counts[index] for index in self.lottery.drawn])
            blocks = None if drawn is None else self._with_always(drawn)
        self._chosen = blocks
        return Plan(step, "explore" if blocks is None else "exploit", blocks)

    def _with_always(self, drawn: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted([self.lottery.drawn[index] for index in drawn] + list(self.lottery.always)))

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs, in types that JSON has, the history's tail among it."""
        return {
            "version": STATE_VERSIONS[-1],
            "blocks": [[block.name, list(block.parameter_names)] for block in self.blocks],
            "section": self.config.model_dump(mode="json"),
            "update_counts": list(self._counts),
            "last_updates": list(self._last_updates),
            **{f"{phase}_steps": count for phase, count in self._steps_by_phase.items()},
            "history": [[record.step, record.phase, list(record.blocks)] for record in self.history],
            "plan": None if self._plan is None else asdict(self._plan),
            "round": None if self._round is None else asdict(self._round),
            "policy": self.policy.state_dict(),
        }

    def check_compatible(self, state: SelectionState, source: str) -> None:
        """Raise CheckpointError, naming ``source``, unless ``state`` was saved with the same blocks."""
        granularity = str(with_defaults(state.section)["granularity"])
        if granularity != self.config.granularity:
            raise CheckpointError(
                f'{source} was saved with adagrad_select.granularity="{granularity}", and here it is '
                f'"{self.config.granularity}": states and counts belong to other units. Set it to "{granularity}", or '
                "load the weights alone: load_module_only=True."
            )
        saved = [(name, tuple(parameters)) for name, parameters in state.blocks]
        here = [(block.name, block.parameter_names) for block in self.blocks]
        if saved != here:
            odd = next((f"{theirs} there, {ours} here" for theirs, ours in zip(saved, here) if theirs != ours), "")
            raise CheckpointError(
                f"{source} was saved with {len(saved)} blocks that are not this run's {len(here)}"
                f"{f' (first difference: {odd[:300]})' if odd else ''}. "
                "Use the model and the adagrad_select.blocks it was saved with, or load the weights alone: "
                "load_module_only=True."
            )

    def load_state_dict(self, state: Mapping[str, Any] | SelectionState) -> None:
        """Continue from ``state``. A section that has changed since applies from the next step on.

        Raises CheckpointError, before anything changes, for a state that is wrong or of other blocks.
        """
        if not isinstance(state, SelectionState):
            state = read_selection_state(state, "the selection state")
        self.check_compatible(state, "the selection state")
        same_section = with_defaults(state.section) == self.config.model_dump(mode="json")
        if same_section:
            self.policy.load_state_dict(state.policy)
        self._counts = list(state.update_counts)
        self._last_updates = [state.last_update(block) for block in range(len(self.blocks))]
        self._steps_by_phase = {"explore": state.explore_steps, "exploit": state.exploit_steps}
        rows = state.history[-TAIL_STEPS:]
        self.history = [Record(step, phase, tuple(blocks)) for step, phase, blocks in rows]
        self.traffic, self._traffic_steps, self._traffic_sums = [], 0, dict.fromkeys(_COUNTERS, 0)
        self.current_traffic = Traffic(step=self.num_steps)
        self._round = None
        if not same_section:
            logger.warning("adagrad_select: the section differs from the checkpoint's; the next step is planned anew.")
            self._plan_ahead()
            return
        if state.round is not None:
            self._round = Round(state.round.start, tuple(state.round.blocks))
        if state.plan is None:
            self._plan_ahead()
            return
        planned = state.plan.blocks
        self._plan = Plan(state.plan.step, state.plan.phase, None if planned is None else tuple(planned))
        self._forget_step()
        self._chosen = self._plan.blocks
