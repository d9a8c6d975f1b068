"""What a block's moments are when it is updated again after steps that did not: the section's ``on_reentry``.

- "keep": what they were.
- "reset": zeros, and the step count starts from zero. The moments of a block that an applied step did not update are
  given back: as soon as it is known that the next step will not update it, which is when that step is planned or, if
  it explores, when its update begins. A step that is skipped gives back nothing.
- "decay": ``exp_avg`` times β1, ``exp_avg_sq`` times β2, to the power of the missed steps, as if the gradients of those
  had been zero; the step count is kept. With the βs of the step that updates it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ds_agsel.residency.states import MOMENTS
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.states.home import StateHome


class Reentry:
    """What one ZeRO optimizer does to moments between two updates of a block.

    Args:
        optimizer: whose step updates the blocks that ``selection`` names, with states in ``home``.
        unlink: told the groups whose moments were given back.
    """

    def __init__(
        self,
        optimizer: compat.ZeROOptimizer,
        selection: Selection,
        home: StateHome,
        unlink: Callable[[Sequence[int]], None],
    ) -> None:
        self._optimizer = optimizer
        self._selection = selection
        self._home = home
        self._unlink = unlink
        self._resets = selection.config.on_reentry == "reset"
        self._decays = selection.config.on_reentry == "decay"
        self._is_due = False

    def plan(self, planned: Collection[int] | None) -> None:
        """Give back what the next step, which updates ``planned``, does not need; None: that is not known yet."""
        if self._resets and planned is not None:
            self._give_back_all_but(planned)

    def begin(self) -> None:
        """Note that the step's blocks are final. It may still be skipped."""
        self._is_due = self._resets

    def before_update(self) -> None:
        """Give back what the step leaves out, once, before its first group's state is brought in."""
        if self._is_due:
            self._is_due = False
            self._give_back_all_but(self._selection.selected_blocks)

    def _give_back_all_but(self, kept: Collection[int]) -> None:
        self._unlink(self._home.release_all_but(kept))

    def entered(self, shown: int, block: int) -> None:
        """Decay the moments of ``block`` for the steps that it missed, where the update will read them."""
        missed = self._selection.missed_steps(block) if self._decays else 0
        if missed == 0:
            return
        state = self._optimizer.optimizer.state.get(compat.masters(self._optimizer)[shown], {})
        betas = compat.param_group_of(self._optimizer, shown)["betas"]
        for key, beta in zip(MOMENTS, betas, strict=True):
            if key in state:
                state[key].mul_(beta**missed)
