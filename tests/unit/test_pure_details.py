"""Details of policies and residency plans that no other test noticed when a mutation run changed them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from ds_agsel import policies
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import CheckpointError, ConfigError, TrainingError
from ds_agsel.policies import Policy, PolicyContext, adagrad_select, num_selected, registry
from ds_agsel.policies.sampling import descending, log_dirichlet
from ds_agsel.residency import Move, plan_moves
from ds_agsel.residency.plan import check_budget
from ds_agsel.residency.swap_plan import FileLayout, Read, default_ring, plan_reads


def context(blocks: int = 4, indices: tuple[int, ...] | None = None, **section: object) -> PolicyContext:
    names = tuple(f"layers.{index}" for index in range(blocks))
    return PolicyContext(SelectionConfig(**section), blocks, 1, names, 10, indices)


# -------------------------------------------------------------------------------- draws


def test_keys_of_any_dtype_are_ordered_as_numbers() -> None:
    assert descending(np.array([0, 2, 1], dtype=np.uint8)) == (1, 2, 0)  # negated as it is, 0 would stay the least
    single = np.array([0.1, 0.3, 7.7], dtype=np.float32)  # and 1 more than 0.1 is another number in fp32
    drawn = [log_dirichlet(alpha, np.random.default_rng(0)) for alpha in (single, single.astype(np.float64))]
    assert np.array_equal(*drawn)


# ------------------------------------------------------------------------------ policies


class Zero(np.random.Generator):
    """Draws 0 where a uniform number in [0, 1) is asked for, as one draw in 2**53 does."""

    def random(self, *args: object, **kwargs: object) -> float:  # type: ignore[override]
        return 0.0


def test_no_draw_explores_at_a_probability_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adagrad_select, "generator", lambda seed, step: Zero(np.random.PCG64(0)))
    assert policies.create(context(explore_rate=0.0)).plan(0, (0,) * 4) is not None
    assert policies.create(context(explore_rate=0.5)).plan(0, (0,) * 4) is None


def test_policies_know_their_context(tmp_path: Path) -> None:
    path = tmp_path / "selection.jsonl"
    path.write_text('{"step": 0, "blocks": [1]}\n\n   \n{"step": 1, "blocks": [2]}\n')
    for section in (
        {"policy": "fixed", "fixed_blocks": ["layers.1"]},
        {"policy": "replay", "replay_file": str(path)},
    ):
        told = context(**section)
        assert policies.create(told).context is told
    assert policies.create(told).plan(1, ()) == (2,), "lines after an empty one count"


@pytest.mark.parametrize(
    ("line", "indices", "problem"),
    [
        ('["step", "blocks"]', None, 'line 1: it is not an object with "step" and "blocks"'),
        ('{"blocks": [1]}', None, 'line 1: it is not an object with "step" and "blocks"'),
        ('{"step": 0, "blocks": [9]}', (1, 2, 3, 4), "the blocks that can be chosen here are 1 to 4."),
        ('{"step": 0, "blocks": [9]}', (1, 2, 3, 7), "the blocks that can be chosen here are [1, 2, 3, 7]."),
    ],
)
def test_a_replayed_line_is_refused(tmp_path: Path, line: str, indices: tuple[int, ...] | None, problem: str) -> None:
    path = tmp_path / "selection.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        policies.create(context(indices=indices, policy="replay", replay_file=str(path)))


class Mine(Policy):
    def plan(self, step: int, update_counts: object) -> None:
        return None


def test_messages_end_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    with pytest.raises(ConfigError, match=r"Register Mine under another name\.$"):
        policies.register("all", Mine)
    with pytest.raises(ConfigError, match=r"with ds_agsel\.policies\.register before training starts\.$"):
        policies.policy_class("none")
    mine = policies.register("mine", Mine)(context(policy="adagrad_select"))
    with pytest.raises(TrainingError, match=r"skipped, not chosen from; lower the learning rate or check the data\.$"):
        mine.choose(3, [0.0, math.nan, 0.0, 0.0])
    with pytest.raises(CheckpointError, match=r"Resume with the policy that wrote the checkpoint\.$"):
        mine.load_state_dict({"a": 1})
    remedy = 'left to choose from. Leave some out, or use policy "all" with always_select=[].'
    with pytest.raises(ConfigError, match=re.escape(remedy) + "$"):
        num_selected(10, 0)


# ----------------------------------------------------------------------------- residency


def test_what_is_not_selected_leaves() -> None:
    assert plan_moves({0, 1, 2}, {1}, dict.fromkeys(range(3), 10), 30) == (Move("leave", 0), Move("leave", 2))


def test_of_blocks_of_one_size_the_first_is_named() -> None:
    remedy = "null for the largest selection and two blocks more, or name the block in never_select."
    with pytest.raises(ConfigError, match=f'state of block "a", which takes 5 bytes.* {re.escape(remedy)}$'):
        check_budget(4, {0: 5, 1: 5, 2: 1}, ["a", "b", "c"])


def test_the_ring_holds_the_largest_blocks_of_a_step() -> None:
    sizes = [3, 9, 5, 7, 1, 8]
    assert default_ring(sizes, 1) == 9
    assert default_ring(sizes, 3) == 9 + 8 + 7
    assert default_ring(iter(sizes), 6) == 9 + 8 + 7 + 5, "of four at most"


def test_a_group_may_fill_the_ring() -> None:
    assert plan_reads([0, 1], FileLayout({0: {"master": 4}, 1: {"master": 3}}, 4), 4) == (Read(0, 0, -1), Read(1, 0, 0))
