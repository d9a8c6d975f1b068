"""The lottery: which blocks a policy chooses from, which are updated at every step, which never, and how many it draws.

Pure: built from the blocks, the section and the blocks that the optimizer has, the same for initialize, check and the
estimator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ds_agsel.blocks import Block, resolve_names
from ds_agsel.config import SECTION, SelectionConfig, contradiction, quoted
from ds_agsel.errors import ConfigError, ConfigErrors
from ds_agsel.policies import num_selected

_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Lottery:
    """The blocks that the policy chooses from, and those that are outside it, as ascending block indices.

    Attributes:
        num_selected: k, how many of ``drawn`` a step updates.
    """

    drawn: tuple[int, ...]
    always: tuple[int, ...] = ()
    never: tuple[int, ...] = ()
    num_selected: int = 1

    @property
    def num_drawn(self) -> int:
        """B, the number of blocks that the policy chooses from."""
        return len(self.drawn)

    @property
    def active(self) -> tuple[int, ...]:
        """The blocks that some step may update, ascending."""
        return tuple(sorted(self.drawn + self.always))


def build_lottery(
    blocks: Sequence[Block], config: SelectionConfig, optimized: Collection[int] | None = None
) -> Lottery:
    """Return the lottery of ``blocks`` under ``config``.

    Args:
        optimized: indices of the blocks with at least one parameter in the optimizer; None: all blocks.

    Raises ConfigErrors with a line for each name or pattern that fits no block, for blocks in both always_select and
    never_select, for one in always_select that the optimizer does not have, and where no block is left to choose from.
    """
    problems: list[str] = []
    outside: dict[str, set[int]] = {}
    for setting in ("always_select", "never_select"):
        try:
            outside[setting] = set(matching(blocks, getattr(config, setting), setting))
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
    drawn = tuple(block.index for block in blocks if block.index not in always | never | unoptimized)
    if problems:
        raise ConfigErrors(problems)
    k = num_selected(config.select_percent, len(drawn))
    return Lottery(drawn, tuple(sorted(always)), tuple(sorted(never | unoptimized)), k)


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
                f"{quoted(block.name for block in blocks)}."
            )
        found |= matched
    return tuple(sorted(found))
