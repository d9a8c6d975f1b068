"""The reference's run of a `Case`, and the comparison of real runs with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    relative_error,
    tiny_model,
    units_of,
)
from torch import Tensor


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


def chooser(case: Case, drawn: Mapping[str, int]) -> Any:
    """ds_agsel's policy for the blocks ``drawn``, with their elements; every block where the case has no section."""
    from ds_agsel import policies
    from ds_agsel.config import parse_section

    if case.section is None:
        return Fixed(range(len(drawn)))
    config = parse_section(case.section)
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


def reference_run(
    case: Case, world_size: int, schedule: Callable[[int], float] = lambda step: 1.0, decoupled: bool = True
) -> tuple[Reference, list[dict[str, dict[str, Tensor]]]]:
    """The reference after ``case``, and its weights, masters and moments before the first and after each step."""
    model = tiny_model(case)
    for parameter in model.parameters():
        # Not `model.to(dtype)`: DeepSpeed leaves the buffers as they are, and rotary frequencies in bf16 are others.
        parameter.data = parameter.data.to(DTYPES[case.dtype])
    blocks = units_of(case, model)
    section = case.section or {}
    always = [list(blocks).index(name) for name in section.get("always_select", ())]
    never = [list(blocks).index(name) for name in section.get("never_select", ())]
    if section.get("granularity") == "module":
        never += [index for index, name in enumerate(blocks) if not is_matrix(name) and index not in always]
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    drawn = {
        block: sum(numels[name] for name in names)
        for index, (block, names) in enumerate(blocks.items())
        if index not in (*always, *never)
    }
    adam = AdamW(
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=lambda name: WEIGHT_DECAY if decays(name, case) else WEIGHT_DECAY / 10,
        decoupled=decoupled,
        schedule=schedule,
    )
    reference = Reference(
        model, list(blocks.values()), chooser(case, drawn), adam, case.clip, always, never, case.stage >= 2,
        section.get("explore_on") == "first_micro_batch", section.get("score", "sum"),
        section.get("select_every", 1), section.get("on_reentry", "keep"),
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
