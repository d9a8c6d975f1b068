"""Which blocks' optimizer states are on the accelerator: the plan of moves (pure) and the runtime that makes them."""

from ds_agsel.residency.plan import Move, default_budget_bytes, eviction_order, plan_moves, update_order
from ds_agsel.residency.states import BlockResidency, Residency

__all__ = [
    "BlockResidency",
    "Move",
    "Residency",
    "default_budget_bytes",
    "eviction_order",
    "plan_moves",
    "update_order",
]
