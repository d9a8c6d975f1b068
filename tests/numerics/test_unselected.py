"""A block that was not selected is bit-identical after the step; all ranks and set-ups select the same blocks."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from support import NARROW, SELECT, STATES, Case, assert_identical, case_id, train

CASES = [
    *(
        Case(stage=stage, offload=offload, dtype=dtype)
        for stage, offload, dtype in product((1, 2, 3), ("none", "cpu"), ("fp32", "bf16"))
    ),
    *(Case(stage=stage, offload=offload, decay_groups=True, accumulation=2, clip=0.3)
      for stage, offload in product((1, 2), ("none", "cpu"))),
    Case(section={**SELECT, **NARROW}, dtype="bf16"),
    Case(stage=3, section={**SELECT, **NARROW}, dtype="bf16"),
    Case(stage=3, offload="cpu", decay_groups=True, accumulation=2, clip=0.3, zero={"sub_group_size": 300}),
]  # fmt: skip


def of_block(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What a rank holds of one block."""
    return {
        "weights": {name: state["weights"][name] for name in names},
        "partitions": [group for group in state["partitions"] if set(group["shapes"]) <= set(names)],
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_unselected_blocks_are_bit_identical(trained, case, ranks):
    check_unselected(trained(case, ranks))


def check_unselected(runs: list[dict[str, Any]]) -> None:
    """Between any two states of ``runs`` the selected blocks moved, all that a rank holds, and no others."""
    for run in runs:
        assert {phase for _, phase, _ in run["history"]} == {"explore", "exploit"}
        for (step, _, selected), (before, after) in zip(run["history"], pairwise(run["observed"]), strict=True):
            for index, names in enumerate(run["blocks"].values()):
                old, new = of_block(before, names), of_block(after, names)
                assert old["partitions"]
                if index not in selected:
                    assert_identical(old, new)
                    assert after["counts"][index] == before["counts"][index]
                    continue
                assert after["counts"][index] == before["counts"][index] + 1
                for group, moved in zip(old["partitions"], new["partitions"], strict=True):
                    assert not any(torch.equal(group[kind], moved[kind]) for kind in STATES), f"step {step}"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_adam_counts_the_updates_of_its_block(trained, case, ranks):
    for run in trained(case, ranks):
        owner = {name: index for index, names in enumerate(run["blocks"].values()) for name in names}
        for state in run["observed"]:
            for group in state["partitions"]:
                assert group["step"] == state["counts"][owner[next(iter(group["shapes"]))]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_stages_and_offload_select_alike(trained, ranks):
    runs = [
        run
        for stage, offload in product((1, 2, 3), ("none", "cpu"))
        for run in trained(Case(stage=stage, offload=offload), ranks)
    ]
    assert len(runs) == 6 * ranks
    for run in runs:
        assert run["history"] == runs[0]["history"]
        assert [state["plan"] for state in run["observed"]] == [state["plan"] for state in runs[0]["observed"]]


def disturb_generators(event: str, engine: Any, step: int) -> None:
    """Leave every generator a script might share in another state on each rank."""
    import random

    import numpy

    seed = 100 * step + torch.distributed.get_rank()
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def test_selection_depends_on_its_own_seed_alone(trained, workers):
    expected = trained(Case(), 2)[0]["history"]
    for run in workers(2).run(train, Case(), disturb_generators):
        assert run["history"] == expected
    exploits = Case(section={**SELECT, "explore_rate": 0.0})
    first, other = (
        trained(exploits.but(section={**exploits.section, "seed": seed}), 1)[0]["history"] for seed in (2, 3)
    )
    assert first != other


def test_policies_of_all_ranks_agree_when_every_rank_sees_other_data(trained):
    """Scores are of the whole batch: they would differ between ranks if a rank took its own gradient."""
    runs = trained(Case(model="net", section={**SELECT, "policy": "gradient_topk"}, offload="cpu"), 2)
    assert runs[0]["history"] == runs[1]["history"]
    assert len({blocks for _, _, blocks in runs[0]["history"]}) > 1
