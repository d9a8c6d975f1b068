"""Two ranks: partitions that are uneven or empty, and the whole batch's numbers whoever computed them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from reference_runs import assert_follows_reference
from support import SELECT, Case, assemble, case_id, relative_error

# numerics/ runs nearly every test on two ranks as well; what needs two stands here.
UNEVEN = [
    Case(model="net", stage=stage, offload=offload, dtype=dtype, decay_groups=True, accumulation=accumulation)
    for stage, offload, dtype, accumulation in product((1, 2), ("none", "cpu"), ("fp32", "bf16"), (1, 2))
]


@pytest.mark.parametrize("case", [case for case in UNEVEN if case.dtype == "fp32"], ids=case_id)
def test_uneven_and_empty_partitions_follow_the_reference(trained, case):
    runs = trained(case, 2)
    assert_follows_reference(case, runs, {"exp_avg": 1e-4, "exp_avg_sq": 1e-4, "masters": 3e-3})
    lone = [group for group in runs[1]["observed"][-1]["partitions"] if next(iter(group["shapes"])).endswith("gain")]
    assert len(lone) == 4  # one element and its padding: rank 1 holds padding alone
    for group in lone:
        assert not group["masters"].any() and not group["exp_avg"].any()


@pytest.mark.parametrize("case", [case for case in UNEVEN if case.dtype == "bf16"], ids=case_id)
def test_ranks_hold_the_same_weights_and_record(trained, case):
    first, second = trained(case, 2)
    for key in ("history", "counts", "plan", "norms"):
        assert first[key] == second[key]
    for one, other in zip(first["observed"], second["observed"], strict=True):
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_two_ranks_are_one_rank_with_two_micro_steps(trained, workers, offload):
    """Rank r's micro-batch given to one rank as micro-step r: the same mean gradient, so the same run."""
    two = trained(Case(offload=offload, section={**SELECT, "policy": "gradient_topk"}), 2)
    (one,) = workers(1).run(
        train_on_both_ranks_data,
        Case(offload=offload, accumulation=2, section={**SELECT, "policy": "gradient_topk"}),
    )
    assert one["history"] == two[0]["history"]
    start, expected, found = (
        one["start"],
        one["weights"],
        assemble([run["observed"][-1] for run in two])["weights"],
    )
    for name, tensor in expected.items():
        assert relative_error(tensor, found[name], start[name]) <= 3e-3, name


def train_on_both_ranks_data(case: Case) -> dict:
    """One rank, whose micro-step m takes what rank m would have taken."""
    from support import batch, build, finish

    engine = build(case)
    start = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    for step in range(case.steps):
        for rank in range(case.accumulation):
            engine.backward(engine(**batch(case, step, 0, rank)).loss)
            engine.step()
    return finish(engine, {"start": start})
