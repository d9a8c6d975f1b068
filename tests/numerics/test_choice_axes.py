"""How blocks are scored and for how long they are held, against the reference."""

from __future__ import annotations

from itertools import product

import pytest
from reference_runs import assert_follows_reference
from support import SELECT, TOPK, VISIT, Case, case_id
from test_reference import FP32

SCORED = [
    Case(section={**TOPK, "score": "rms"}, model="net"),
    Case(section={**SELECT, "score": "norm"}, stage=3, offload="cpu", accumulation=2, clip=0.3),
    Case(section={**TOPK, "score": "rms", **VISIT}, stage=1),
]
SCORED_WIDE = [
    Case(section={**TOPK, "score": score}, stage=stage, offload=offload)
    for score, stage, offload in product(("norm", "rms"), (1, 2, 3), ("none", "cpu"))
]


@pytest.mark.parametrize("case", SCORED, ids=case_id)
def test_selections_by_score_follow_the_reference(trained, case):
    assert_follows_reference(case, trained(case, 2), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", SCORED_WIDE, ids=case_id)
def test_selections_by_every_score_follow_the_reference(trained, case, ranks):
    assert_follows_reference(case, trained(case, ranks), FP32)


def test_each_score_chooses_other_blocks(trained):
    histories = [trained(Case(section={**TOPK, "score": score}), 2)[0]["history"] for score in ("sum", "norm", "rms")]
    assert histories[0] != histories[1] != histories[2] != histories[0]
