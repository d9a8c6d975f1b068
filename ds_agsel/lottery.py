"""The lottery: which blocks a policy chooses from, which are updated at every step, which never, and how many it draws.

Pure: built from the blocks, the section and the blocks that the optimizer has, the same for initialize, check and the
estimator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from ds_agsel.blocks import Block, resolve_names, shown_names
from ds_agsel.config import SECTION, SelectionConfig, contradiction
from ds_agsel.errors import ConfigError, ConfigErrors
from ds_agsel.policies import Policy, Quota, num_selected, share_of

_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Lottery:
    """The blocks that the policy chooses from, and those that are outside it, as ascending block indices.

    Attributes:
        num_selected: k, how many of ``drawn`` a step updates at most.
        share: what a step may update of ``drawn`` where select_percent counts parameters; None: k blocks.
    """

    drawn: tuple[int, ...]
    always: tuple[int, ...] = ()
    never: tuple[int, ...] = ()
    num_selected: int = 1
    share: Quota | None = None

    @property
    def num_drawn(self) -> int:
        """B, the number of blocks that the policy chooses from."""
        return len(self.drawn)

    @cached_property
    def active(self) -> tuple[int, ...]:
        """The blocks that some step may update, ascending."""
        return tuple(sorted(self.drawn + self.always))

    @cached_property
    def quota(self) -> Quota:
        """What one step may update of ``drawn``, by their places in it."""
        return self.share or Quota.of_blocks(self.num_drawn, self.num_selected)

    def bound(self, policy: Policy | None = None) -> Bound:
        """Return the most that a step can update, chosen by ``policy``; None: by one that keeps to the quota."""
        if policy is not None and not policy.keeps_to_quota:
            return Bound(policy.max_selected + len(self.always))
        number = self.num_selected if policy is None else policy.max_selected
        return Bound(number + len(self.always), None if self.share is None else self)


@dataclass(frozen=True)
class Bound:
    """The most that one step can update, by which its memory is sized.

    Attributes:
        num_blocks: how many blocks, those of always_select among them.
        lottery: the lottery whose share of the parameters the step keeps to; None: the number alone is bounded.
    """

    num_blocks: int
    lottery: Lottery | None = None

    def most(self, values: Mapping[int, int], more: int = 0) -> int:
        """Return what ``values`` (by block) of a step's blocks and of ``more`` other blocks add up to at most."""
        largest = sorted(values.values(), reverse=True)
        by_number = sum(largest[: self.num_blocks + more])
        if self.lottery is None:
            return by_number
        drawn = self.lottery.quota.most([values.get(block, 0) for block in self.lottery.drawn])
        always = sum(values.get(block, 0) for block in self.lottery.always)
        return min(by_number, drawn + always + sum(largest[:more]))


def build_lottery(
    blocks: Sequence[Block], config: SelectionConfig, optimized: Collection[int] | None = None
) -> Lottery:
    """Return the lottery of ``blocks`` under ``config``.

    Args:
        optimized: indices of the blocks with at least one parameter in the optimizer; None: all blocks.

    Units that are not eligible (units.py, [Note: Units]) are drawn never, or always where always_select names them.

    Raises ConfigErrors with a line for each name or pattern that fits no block, for blocks in both always_select and
    never_select, for one in always_select that the optimizer does not have, and where no block is left to choose from.
    """
    problems: list[str] = []
    outside: dict[str, set[int]] = {}
    for setting in ("always_select", "never_select"):
        try:
            names = getattr(config, setting)
            if config.is_preset(setting):  # which knows no model: a tied head is in the embedding's block
                names = [name for name in names if name in {block.name for block in blocks}]
            outside[setting] = set(matching(blocks, names, setting))
        except ConfigError as error:
            problems.append(str(error))
            outside[setting] = set()
    always, never = outside["always_select"], outside["never_select"]
    both = sorted(always & never)
    if both:
        problems.append(contradiction(blocks[index].name for index in both))
    unoptimized = set() if optimized is None else {block.index for block in blocks} - set(optimized)
    problems += [
        f'{SECTION}.always_select names "{blocks[index].name}", of which the optimizer has no parameter. Give the '
        "optimizer its parameters, or take the name out."
        for index in sorted(unoptimized & always)
    ]
    ineligible = {block.index for block in blocks if not block.is_eligible} - always
    never = never | unoptimized | ineligible
    drawn = tuple(block.index for block in blocks if block.index not in always | never)
    if problems:
        raise ConfigErrors(problems)
    share = None
    if config.granularity == "module":
        share = share_of(config.select_percent, [blocks[index].numel for index in drawn])
    warns = not config.is_preset("select_percent")
    k = num_selected(config.select_percent, len(drawn), warns) if share is None else share.max_selected
    return Lottery(drawn, tuple(sorted(always)), tuple(sorted(never)), k, share)


def matching(blocks: Sequence[Block], names: Iterable[str], setting: str) -> tuple[int, ...]:
    """Return the indices of the blocks that ``names`` mean, ascending, each once.

    A name that no block has and that contains one of ``*?[`` is a pattern over the blocks' names, as a shell has them.
    Raises ConfigError, naming ``setting``, for a name that no block has and a pattern that matches none.
    """
    known = {block.name for block in blocks}
    found: set[int] = set()
    for name in names:
        if name in known or not _GLOB_CHARACTERS & set(name):
            found |= set(resolve_names(blocks, (name,), setting))
            continue
        matched = {block.index for block in blocks if fnmatchcase(block.name, name)}
        if not matched:
            raise ConfigError(
                f'{SECTION}.{setting} has the pattern "{name}", which matches no block of this model. Its blocks: '
                f"{shown_names(blocks)}."
            )
        found |= matched
    return tuple(sorted(found))
