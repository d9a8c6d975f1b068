"""The same named blocks at every step."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.config import SECTION, did_you_mean, quoted
from ds_agsel.errors import ConfigError
from ds_agsel.policies.base import Policy, PolicyContext
from ds_agsel.policies.registry import register


@register("fixed")
class Fixed(Policy):
    """The blocks of ``fixed_blocks``, which replaces select_percent. They must be in the lottery."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        names = context.block_names
        wanted = context.config.fixed_blocks or ()
        for name in wanted:
            if name not in names:
                raise ConfigError(
                    f'{SECTION}.fixed_blocks names "{name}", which is not a block that can be chosen.'
                    f"{did_you_mean(name, names)} Blocks that can: {quoted(names)}."
                )
        self._blocks = tuple(sorted({names.index(name) for name in wanted}))

    @property
    def max_selected(self) -> int:
        return len(self._blocks)

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        return self._blocks
