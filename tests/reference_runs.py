"""The reference's run of a `Case`, and the comparison of real runs with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from reference import AdamW, Reference
from support import (
    BETAS,
    DTYPES,
    EPS,
    LEARNING_RATE,
    STATES,
    WEIGHT_DECAY,
    Case,
    assemble,
    assert_identical,
    batch,
    decays,
    is_matrix,
    model_blocks,
    model_units,
    relative_error,
    tiny_model,
)
from torch import Tensor

if TYPE_CHECKING:
    from ds_agsel.config import SelectionConfig


History = Sequence[tuple[int, str, tuple[int, ...]]]


class Fixed:
    """A chooser that takes the same blocks at every step."""

    def __init__(self, blocks: Sequence[int]):
        self.blocks = tuple(blocks)

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        return self.blocks

    def choose(self, step: int, scores: Sequence[float]) -> tuple[int, ...]:
        raise NotImplementedError

    def selects_nothing(self, step: int) -> bool:
        return False

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:
        pass


class Recorded:
    """A chooser that takes, of the blocks ``drawn``, those that another run has updated."""

    def __init__(self, history: History, drawn: Sequence[int]):
        self.phases = [phase for _, phase, _ in history]
        self.blocks = [tuple(drawn.index(block) for block in blocks if block in drawn) for _, _, blocks in history]

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        return None if self.phases[step] == "explore" else self.blocks[step]

    def choose(self, step: int, scores: Sequence[float]) -> tuple[int, ...]:
        return self.blocks[step]

    def selects_nothing(self, step: int) -> bool:
        return not self.blocks[step]

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:
        pass


def chooser(case: Case, config: SelectionConfig, drawn: Mapping[str, int]) -> Any:
    """ds_agsel's policy for the blocks ``drawn``, with their elements; every block where the case has no section."""
    from ds_agsel import policies

    if case.section is None:
        return Fixed(range(len(drawn)))
    k, share = max(1, math.floor(config.select_percent * len(drawn) / 100)), None
    if config.granularity == "module":
        share = policies.Quota(tuple(drawn.values()), math.floor(config.select_percent * sum(drawn.values()) / 100))
        k = share.max_selected
    return policies.create(
        policies.PolicyContext(
            config=config,
            num_blocks=len(drawn),
            num_selected=k,
            block_names=tuple(drawn),
            steps_per_epoch=config.steps_per_epoch,
            share=share,
        )
    )


def outside(config: SelectionConfig, blocks: Sequence[str]) -> tuple[list[int], list[int]]:
    """The indices of the blocks that are updated at every step, and of those that are at none."""
    always, never = (
        # A preset knows no model: it may name a head that is tied to the embedding.
        [blocks.index(name) for name in getattr(config, field) if name in blocks or not config.is_preset(field)]
        for field in ("always_select", "never_select")
    )
    if config.granularity == "module":
        never += [index for index, name in enumerate(blocks) if not is_matrix(name) and index not in (*always, *never)]
    return always, never


def reference_run(
    case: Case,
    world_size: int,
    schedule: Callable[[int], float] = lambda step: 1.0,
    decoupled: bool = True,
    history: History | None = None,
) -> tuple[Reference, list[dict[str, dict[str, Tensor]]]]:
    """The reference after ``case``, and its weights, masters and moments before the first and after each step.

    Its blocks are those of ``history``, where that is given; else its policy's.
    """
    from ds_agsel.config import parse_section

    config = parse_section(case.section or {})  # with what a preset fills in
    model = tiny_model(case)
    for parameter in model.parameters():
        # Not `model.to(dtype)`: DeepSpeed leaves the buffers as they are, and rotary frequencies in bf16 are others.
        parameter.data = parameter.data.to(DTYPES[case.dtype])
    blocks = (model_units if config.granularity == "module" else model_blocks)(model)
    always, never = outside(config, list(blocks))
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    drawn = {
        index: (block, sum(numels[name] for name in names))
        for index, (block, names) in enumerate(blocks.items())
        if index not in (*always, *never)
    }
    chooses = chooser(case, config, dict(drawn.values())) if history is None else Recorded(history, list(drawn))
    adam = AdamW(
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=lambda name: WEIGHT_DECAY if decays(name, case) else WEIGHT_DECAY / 10,
        decoupled=decoupled,
        schedule=schedule,
    )
    reference = Reference(
        model, list(blocks.values()), chooses, adam, case.clip, always, never, case.stage >= 2,
        config.explore_on == "first_micro_batch", config.score, config.select_every, config.on_reentry,
    )  # fmt: skip
    states = [reference_state(reference)]
    for step in range(case.steps):
        reference.step(
            [[batch(case, step, micro, rank) for micro in range(case.accumulation)] for rank in range(world_size)]
        )
        states.append(reference_state(reference))
    return reference, states


def reference_state(reference: Reference) -> dict[str, dict[str, Tensor]]:
    """What `full_state` gives of an engine."""
    model_weights = {name: parameter.detach().clone() for name, parameter in reference.parameters.items()}
    return {"weights": model_weights} | {kind: copy.deepcopy(getattr(reference, kind)) for kind in STATES}


def assert_follows_reference(
    case: Case,
    runs: Sequence[Mapping[str, Any]],
    tolerance: Mapping[str, float],
    **reference_arguments: Any,
) -> None:
    """Each rank of ``runs`` (`train` with `observe_state`) took the reference's selections, and after each step each
    parameter's master and moments are as near: L2 of the difference at most ``tolerance[kind]`` times L2 of how far
    the reference has moved them."""
    reference, states = reference_run(case, len(runs), **reference_arguments)
    history = [(record.step, record.phase, record.blocks) for record in reference.history]
    for run in runs:
        assert run["history"] == history
        assert list(run["counts"]) == reference.update_counts
        assert list(run["blocks"].values()) == [list(names) for names in reference.blocks]
        assert_identical(runs[0]["weights"], run["weights"])
    for step, expected in enumerate(states):
        actual = assemble([run["observed"][step] for run in runs])
        for name, master in actual["masters"].items():
            assert torch.equal(actual["weights"][name], master.to(actual["weights"][name].dtype)), (
                name,
                step,
            )
        for kind, allowed in tolerance.items():
            start = states[0][kind]
            errors = [(relative_error(e, actual[kind][n], start[n]), n) for n, e in expected[kind].items()]
            worst = max(errors)
            assert worst[0] <= allowed, f"{worst} is the worst of {kind} after step {step}, {allowed} is allowed"
