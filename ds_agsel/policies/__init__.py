"""Which blocks a step updates: pure choices from step, scores and counts, behind one interface, by name."""

from ds_agsel.policies import (  # noqa: F401  (importing a policy's module registers it)
    adagrad_select,
    all,
    cost_aware,
    cyclic,
    fixed,
    gradient_topk,
    grass,
    misa,
    random,
    replay,
)
from ds_agsel.policies.answers import checked_choice, checked_plan
from ds_agsel.policies.base import Policy, PolicyContext, num_selected, share_of
from ds_agsel.policies.quota import Quota
from ds_agsel.policies.registry import create, policy_class, register

__all__ = [
    "Policy",
    "PolicyContext",
    "Quota",
    "checked_choice",
    "checked_plan",
    "create",
    "num_selected",
    "policy_class",
    "register",
    "share_of",
]
