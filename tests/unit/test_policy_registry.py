"""Policies by name: the built-in ones, users' own, and the state that they keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from policy_contexts import make, selection_file

from ds_agsel import policies
from ds_agsel.errors import CheckpointError, ConfigError
from ds_agsel.policies import Policy, registry

REMEMBERS_NOTHING = ["adagrad_select", "all", "cyclic", "fixed", "gradient_topk", "random", "replay"]
REMEMBERS_SCORES = ["cost_aware", "grass", "misa"]
BUILT_IN = sorted([*REMEMBERS_NOTHING, *REMEMBERS_SCORES])


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    yield


class Last(Policy):
    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        return (self.context.num_blocks - 1,)


@pytest.mark.usefixtures("own_names")
def test_a_policy_of_the_users_own_by_call_and_by_decorator() -> None:
    assert policies.register("last", Last) is Last
    policy = make(policy="last", steps_per_epoch=None)
    assert (policy.name, policy.plan(0, [0] * 6), policy.explore_probability(0)) == ("last", (5,), 0.0)
    assert not policy.needs_steps_per_epoch

    @policies.register("first")
    class First(Last):
        def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
            return (0,)

    assert make(policy="first").plan(0, [0] * 6) == (0,)
    assert isinstance(make(policy="first"), First)


@pytest.mark.usefixtures("own_names")
def test_a_name_belongs_to_one_class_which_may_be_defined_again() -> None:
    policies.register("last", Last)
    again = type("Last", (Last,), {"__module__": Last.__module__, "__qualname__": Last.__qualname__})
    policies.register("last", again)
    assert policies.policy_class("last") is again
    with pytest.raises(
        ConfigError, match=r'^Policy "random" is already ds_agsel.policies.random.Random. Register Last'
    ):
        policies.register("random", Last)


def test_what_is_no_policy_can_not_be_registered() -> None:
    with pytest.raises(TypeError, match='can\'t be registered as policy "mine": it is not a subclass of Policy'):
        policies.register("mine", dict)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"^A policy's name is a non-empty string, not ''"):
        policies.register("", Last)


def test_an_unknown_policy_is_refused_with_the_nearest_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # What other tests of this process have imported may have registered policies too.
    monkeypatch.setattr(registry, "_POLICIES", {name: registry._POLICIES[name] for name in BUILT_IN})
    names = ", ".join(f'"{name}"' for name in BUILT_IN)
    expected = f'adagrad_select.policy="cyclc" is unknown. Did you mean "cyclic"? Policies: {names}; register your own'
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
        make(policy="cyclc")


@pytest.mark.parametrize("name", REMEMBERS_NOTHING)
def test_policies_that_remember_no_scores_keep_no_state(name: str, tmp_path: Path) -> None:
    settings_of: dict[str, dict[str, Any]] = {
        "fixed": {"fixed_blocks": ["layers.1"]},
        "replay": {"replay_file": selection_file(tmp_path, {"step": 0, "blocks": [1]})},
    }
    policy = make(policy=name, **settings_of.get(name, {}))
    assert policy.name == name
    assert policy.needs_steps_per_epoch == (name == "adagrad_select")
    assert policy.state_dict() == {}
    policy.load_state_dict({})
    with pytest.raises(CheckpointError, match=f"^Policy \"{name}\" keeps no state, and the checkpoint has \\['x'\\]"):
        policy.load_state_dict({"x": 1})
