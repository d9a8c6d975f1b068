"""Explore steps that hold few gradients: a block is scored when backward leaves it, dropped once it is beaten.

[Note: Streaming top-k] The choice is the same as with all gradients kept, because it uses the same scores, and a block
that k others have beaten, or as many as the share of the parameters takes, can't be chosen any more. On several ranks a
block's gradients are reduced, and its norms added up, when its last one has come; all ranks see gradients in one order,
as ZeRO's buckets need anyway.
A block some of whose parameters get no gradient stays to the end, and is scored there with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ds_agsel.errors import TrainingError
from ds_agsel.policies.quota import Quota, RunningAdmission
from ds_agsel.selection import Selection


class ExploreStream:
    """The blocks that an explore step has seen so far. It acts on gradients through three functions of the optimizer.

    Args:
        numbers_of_params: block -> how many parameters it has.
        score: the score of a block all of whose gradients are there. Collective.
        keep: put the block's gradients, which these parameters hold, where the step will look for them.
        forget: drop the block's gradients, kept before or not.
    """

    def __init__(
        self,
        selection: Selection,
        numbers_of_params: Mapping[int, int],
        score: Callable[[int], float],
        keep: Callable[[int, list[nn.Parameter]], None],
        forget: Callable[[int], None],
    ) -> None:
        self._selection = selection
        self._numbers_of_params = numbers_of_params
        self._score, self._keep, self._forget = score, keep, forget
        context, drawn = selection.policy.context, selection.lottery.drawn
        everything = Quota.of_blocks(len(drawn), len(drawn))
        self._best = RunningAdmission(context.quota if selection.policy.chooses_highest_scores else everything)
        self._takes_none = selection.policy.selects_nothing(selection.plan.step)
        self._place_in_lottery = {block: place for place, block in enumerate(drawn)}
        self._waiting: dict[int, list[nn.Parameter]] = {}
        self._unscored: set[int] = set()
        self.scores: dict[int, float] = {}
        self.kept: set[int] = set(selection.lottery.always)
        self.dropped: set[int] = set()
        self.is_over = False  # all scores have been taken; later gradients add to the kept ones

    def wants(self, block: int) -> bool:
        """Return whether the stream takes a gradient of ``block``; not after `flush`, which left the block to the step.

        Raises TrainingError for a block that has been scored: what was dropped can't be added to.
        """
        if block in self.scores:
            raise TrainingError(
                f"step {self._selection.plan.step} explores, and block {self._selection.blocks[block].name} got a "
                "second gradient after it had been scored. Call backward once a step, on the sum of the losses, or set "
                "gradient_accumulation_steps; with activation checkpointing, set use_reentrant=False."
            )
        return block not in self._unscored

    def take(self, block: int, param: nn.Parameter) -> None:
        """Note that ``param``'s gradient is there, and score its block if it was the last."""
        waiting = self._waiting.setdefault(block, [])
        waiting.append(param)
        if len(waiting) == self._numbers_of_params[block]:
            self._finish(block)

    def _finish(self, block: int) -> None:
        self.scores[block] = self._score(block)
        params = self._waiting.pop(block)
        self.kept.add(block)
        out = self._ruled_out(block)
        for gone in out:
            self.kept.discard(gone)
            self.dropped.add(gone)
            self._forget(gone)
        if block not in out:
            self._keep(block, params)

    def _ruled_out(self, block: int) -> tuple[int, ...]:
        """Return the blocks that ``block``'s score rules out, which may be ``block`` itself."""
        place = self._place_in_lottery.get(block)
        if place is None:
            return ()  # always selected
        if self._takes_none:
            return (block,)
        drawn = self._selection.lottery.drawn
        return tuple(drawn[gone] for gone in self._best.add(place, self.scores[block]))

    @property
    def held(self) -> set[int]:
        """The blocks that have gradients now: those kept, and those that backward is at."""
        return self.kept.union(self._waiting)

    def flush(self, and_score: bool) -> None:
        """End backward: keep the blocks that are not whole, scored now (the last scores) or left to the step."""
        for block in sorted(self._waiting):
            if and_score:
                self._finish(block)
            else:
                self.kept.add(block)
                self._unscored.add(block)
                self._keep(block, self._waiting.pop(block))
        silent = set(self._selection.active_blocks) - self.kept - self.dropped
        self.kept |= silent  # their score is 0, which is the highest where few blocks have gradients
        for block in sorted(silent):
            self._keep(block, [])
        self.is_over = and_score
