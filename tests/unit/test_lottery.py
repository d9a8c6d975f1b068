"""The lottery: names, patterns, what the optimizer lacks, and each fault told once."""

from __future__ import annotations

from typing import Any

import pytest

from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import ConfigErrors
from ds_agsel.lottery import Lottery, build_lottery

NAMES = ("embedding", "model.layers.0", "model.layers.1", "model.layers.10", "norm", "head")
BLOCKS = tuple(Block(index, name, (f"{name}.weight",), 1) for index, name in enumerate(NAMES))


def lottery(optimized: set[int] | None = None, **section: Any) -> Lottery:
    return build_lottery(BLOCKS, SelectionConfig(**section), optimized)


def test_everything_is_drawn_by_default() -> None:
    found = lottery(select_percent=50)
    assert found == Lottery((0, 1, 2, 3, 4, 5), num_selected=3)
    assert found.num_drawn == 6 and found.active == (0, 1, 2, 3, 4, 5)


def test_blocks_outside_are_not_counted() -> None:
    found = lottery({0, 1, 2, 3, 4}, select_percent=50, always_select=["norm"], never_select=["embedding"])
    assert found == Lottery((1, 2, 3), always=(4,), never=(0, 5), num_selected=1)
    assert found.active == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.*"], (1, 2, 3)),
        (["model.layers.?"], (1, 2)),
        (["model.layers.[01]"], (1, 2)),
        (["model.layers.1*", "head"], (2, 3, 5)),
        (["*e*d*"], (0, 5)),
    ],
)
def test_never_select_takes_patterns(names: list[str], expected: tuple[int, ...]) -> None:
    assert lottery(never_select=names).never == expected
    assert lottery(always_select=names).always == expected


def test_a_block_whose_name_has_a_pattern_s_characters_is_that_block() -> None:
    blocks = (*BLOCKS, Block(6, "model.layers.[x]", ("w",), 1), Block(7, "model.layers.x", ("v",), 1))
    assert build_lottery(blocks, SelectionConfig(never_select=["model.layers.[x]"])).never == (6,)


@pytest.mark.parametrize(
    ("section", "problems"),
    [
        ({"never_select": ["embeding"]}, ['never_select names "embeding", which is not a block']),
        ({"always_select": ["layers.*"]}, ['always_select has the pattern "layers.*", which matches no block']),
        (
            {"always_select": ["embeding"], "never_select": ["layers.*"]},
            ['always_select names "embeding"', 'never_select has the pattern "layers.*"'],
        ),
        (
            {"always_select": ["model.layers.1"], "never_select": ["model.layers.*"]},
            ['never_select both name "model.layers.1". A block is updated at every step or at none'],
        ),
        ({"always_select": ["head"]}, ['always_select names "head", of which the optimizer has no parameter']),
        ({"never_select": ["*"]}, ["never_select name every block, so that none is left to choose from"]),
    ],
)
def test_each_fault_is_told(section: dict[str, Any], problems: list[str]) -> None:
    from ds_agsel.errors import ConfigError

    with pytest.raises(ConfigError) as raised:
        lottery({0, 1, 2, 3, 4}, **section)
    error = raised.value
    told = error.problems if isinstance(error, ConfigErrors) else [str(error)]
    assert len(told) == len(problems)
    assert all(expected in text for expected, text in zip(problems, told, strict=True)), told
