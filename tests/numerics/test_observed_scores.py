"""The scores that a policy observes, in both phases, are those of the reference's whole and unclipped gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import pytest
from reference_runs import reference_run
from support import SELECT, VISIT, Case, build, case_id, fp16_allowed, run_steps

from ds_agsel import policies
from ds_agsel.policies import PolicyContext, registry
from ds_agsel.policies.adagrad_select import AdaGradSelect

Seen = list[tuple[int, tuple[int, ...], tuple[float, ...]]]


class Recording(AdaGradSelect):
    """Chooses as its base does, and keeps what it observes."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.seen: Seen = []

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:
        self.seen.append((step, tuple(units), tuple(scores)))


@contextmanager
def registered() -> Iterator[None]:
    """Inside, a section may name `Recording`."""
    with patch.dict(registry._POLICIES):
        policies.register("recording", Recording)
        yield


def observed(case: Case) -> Seen:
    with registered(), fp16_allowed():
        engine = build(case)
    run_steps(engine, case)
    seen: Seen = engine.selection.policy.seen
    engine.destroy()
    return seen


SECTION = {**SELECT, "policy": "recording", "always_select": ["final_norm"]}
CLIP = 0.1
FP16 = {"dtype": "fp16", "config": {"fp16": {"loss_scale": 128.0}}}
CASES = [
    Case(section={**SECTION, "score": score}, stage=stage, offload=offload, accumulation=accumulation, clip=CLIP)
    for score, stage, offload, accumulation in product(("sum", "norm", "rms"), (1, 2, 3), ("none", "cpu"), (1, 2))
] + [
    Case(section={**SECTION, "score": "norm"}, stage=stage, offload=offload, clip=CLIP, **FP16)
    for stage, offload in product((1, 2, 3), ("none", "cpu"))
] + [
    Case(section={**SECTION, "score": "rms", **VISIT}, stage=stage, clip=CLIP) for stage in (1, 2, 3)
] + [
    Case(section={**SECTION, "score": "rms", "granularity": "module"}, stage=stage, clip=CLIP) for stage in (2, 3)
]  # fmt: skip
BY_DEFAULT = {
    ("fp32", "sum", 1, "none", 2), ("fp32", "norm", 2, "cpu", 1), ("fp32", "rms", 3, "none", 2),
    ("fp16", "norm", 2, "none", 1), ("fp16", "norm", 3, "cpu", 1),
}  # fmt: skip


def is_by_default(case: Case, ranks: int) -> bool:
    is_plain = set(case.section) == {*SECTION, "score"}
    axes = (case.dtype, case.section["score"], case.stage, case.offload, case.accumulation)
    return ranks == 2 and is_plain and axes in BY_DEFAULT


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        pytest.param(case, ranks, marks=[] if is_by_default(case, ranks) else pytest.mark.slow)
        for case, ranks in product(CASES, (1, 2))
    ],
    ids=case_id,
)
def test_observed_scores_are_those_of_the_unclipped_gradient(workers, case, ranks):
    """Without the loss scale, over all ranks and micro-batches.

    fp16 rounds gradients by 2**-11, which turns the first AdamW step of some elements: 2e-2 was seen after four steps.
    """
    runs = workers(ranks).run(observed, case)
    with registered():
        reference, _ = reference_run(case, ranks)
    assert all(record.norm > CLIP for record in reference.history)
    assert {record.phase for record in reference.history} == {"explore", "exploit"}
    expected: Seen = reference.chooser.seen
    for seen in runs:
        assert seen == runs[0]
        assert [(step, units) for step, units, _ in seen] == [(step, units) for step, units, _ in expected]
        for (step, _, scores), (_, _, of_reference) in zip(seen, expected, strict=True):
            assert scores == pytest.approx(of_reference, rel=1e-4 if case.dtype == "fp32" else 5e-2), step
