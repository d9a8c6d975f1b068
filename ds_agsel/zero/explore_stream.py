"""Explore steps that hold few gradients: a block is scored when backward leaves it, dropped once it is beaten.

[Note: Streaming top-k] The choice is the same as with all gradients kept, because it uses the same scores, and a block
that k others have beaten, or as many as the share of the parameters takes, can't be chosen any more. On several ranks a
block's gradients are reduced, and its norms added up, when its last one has come; all ranks see gradients in one order,
as ZeRO's buckets need anyway.
A block some of whose parameters get no gradient stays to the end, and is scored there with the rest.

What is chosen is put where the step looks for it at the end of backward, when nothing can beat it any more: with
offload a gradient that comes to nothing never travels to the host.

[Note: Late scores] A score is computed on the accelerator and copied to the host, which does not wait for it: it goes
on to queue backward, and looks at the score when the next ones are under way. Up to `LATE_BATCHES` batches of blocks
are held beyond the k best; only then does the host wait, for work that lies that far back, so that the accelerator
never runs dry. With more than `SCORED_AT_ONCE` blocks, several of them are scored at once, so that the number of
reductions and copies does not grow with the number of blocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import nn

from ds_agsel.errors import TrainingError
from ds_agsel.policies.quota import Quota, RunningAdmission
from ds_agsel.selection import Selection

LATE_BATCHES = 2
SCORED_AT_ONCE = 64  # with up to as many blocks, each is scored alone


def batch_size(num_active: int) -> int:
    """Return how many of ``num_active`` blocks are scored at once."""
    return math.ceil(num_active / SCORED_AT_ONCE)


def most_beyond_the_best(num_active: int) -> int:
    """Return how many blocks' gradients there are beside the best ones', at most: [Note: Late scores].

    Their scores are on their way from the accelerator, or backward is at them.
    """
    return (LATE_BATCHES + 1) * batch_size(num_active)


class Scores(Protocol):
    """Scores of blocks on their way to the host."""

    def has_arrived(self) -> bool:
        """Return whether `get` would not wait."""

    def get(self) -> dict[int, float]:
        """Return them by block. The host waits for what was queued up to their copy, and for no more."""


class ExploreStream:
    """The blocks that an explore step has seen so far. It acts on gradients through three functions of the optimizer.

    Args:
        numbers_of_params: block -> how many parameters it has.
        score: start to compute the scores of blocks all of whose gradients are there. Collective.
        keep: put the block's gradients, which these parameters hold, where the step will look for them.
        forget: drop the block's gradients, which its parameters hold.
    """

    def __init__(
        self,
        selection: Selection,
        numbers_of_params: Mapping[int, int],
        score: Callable[[Sequence[int]], Scores],
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
        self._batch_size = batch_size(len(selection.active_blocks))
        self._waiting: dict[int, list[nn.Parameter]] = {}  # blocks without a score, with what they have
        self._whole: list[int] = []  # those of them that have all their gradients, and are scored next
        self._pending: deque[Scores] = deque()
        self._chosen: dict[int, list[nn.Parameter]] = {}  # blocks that no other has beaten so far, with what they have
        self._unscored: set[int] = set()
        self.scored: set[int] = set()  # also those whose score is on its way
        self.kept: set[int] = set(selection.lottery.always)
        self.dropped: set[int] = set()
        self.is_over = False  # all scores have been taken; later gradients add to the kept ones

    def wants(self, block: int) -> bool:
        """Return whether the stream takes a gradient of ``block``; not after `flush`, which left the block to the step.

        Raises TrainingError for a block that has been scored: what was dropped can't be added to.
        """
        if block in self.scored or block in self._whole:
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
            self._whole.append(block)
            if len(self._whole) >= self._batch_size:
                self._start()

    def _start(self) -> None:
        """Start to score the whole blocks, and decide on those whose scores are there."""
        if self._whole:
            blocks, self._whole = self._whole, []
            self.scored.update(blocks)
            self._pending.append(self._score(blocks))
        while self._pending and (len(self._pending) > LATE_BATCHES or self._pending[0].has_arrived()):
            self._decide(self._pending.popleft().get())

    def _decide(self, scores: Mapping[int, float]) -> None:
        """Let the blocks of ``scores`` that are among the best so far stay, and drop those that they beat."""
        for block, score in scores.items():
            params = self._waiting.pop(block)
            self.kept.add(block)
            out = self._ruled_out(block, score)
            for gone in out:
                self.kept.discard(gone)
                self.dropped.add(gone)
                self._chosen.pop(gone, None)
                self._forget(gone)
            if block not in out:
                self._chosen[block] = params

    def _ruled_out(self, block: int, score: float) -> tuple[int, ...]:
        """Return the blocks that ``block``, with its ``score``, rules out, which may be ``block`` itself."""
        place = self._place_in_lottery.get(block)
        if place is None:
            return ()  # always selected
        if self._takes_none:
            return (block,)
        drawn = self._selection.lottery.drawn
        return tuple(drawn[gone] for gone in self._best.add(place, score))

    @property
    def held(self) -> set[int]:
        """The blocks that have gradients now: those kept, those without a score, and those that backward is at."""
        return self.kept.union(self._waiting)

    def flush(self, and_score: bool) -> None:
        """End backward: keep the blocks that are not whole, scored now (the last scores) or left to the step."""
        parts = sorted(set(self._waiting) - self.scored - set(self._whole))
        if and_score:
            self._whole += parts
        self._start()
        while self._pending:  # the newest first: once it is there, all are
            self._decide(self._pending.pop().get())
        for block in [] if and_score else parts:
            self.kept.add(block)
            self._unscored.add(block)
            self._chosen[block] = self._waiting.pop(block)
        silent = set(self._selection.active_blocks) - self.kept - self.dropped
        self.kept |= silent  # their score is 0, which is the highest where few blocks have gradients
        self._chosen.update((block, []) for block in silent)
        for block in sorted(self._chosen):
            self._keep(block, self._chosen[block])
        self._chosen = {}
        self.is_over = and_score
