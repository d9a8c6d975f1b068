"""Numbers of an applied step for a monitor."""

from __future__ import annotations

import math

from ds_agsel.selection import Selection

ADAM_BYTES_PER_ELEMENT = 8  # exp_avg and exp_avg_sq, fp32


def scalars(selection: Selection) -> dict[str, float]:
    """Return the numbers of the last applied step, by name; empty before the first.

    ``explore`` is 1 or 0, ``explore_rate`` the paper's ε, ``count_entropy`` that of the update counts over its
    largest possible value (1: all blocks alike). ``saved_gradient_bytes`` are those of blocks that got no gradient,
    ``saved_state_bytes`` the Adam moments (fp32) of blocks that were not updated; both of the whole model, over
    all ranks, against full fine-tuning.
    """
    if not selection.history:
        return {}
    record = selection.history[-1]
    total = sum(block.numel for block in selection.blocks)
    updated = sum(selection.blocks[index].numel for index in record.blocks)
    explore = record.phase == "explore"
    return {
        "explore": float(explore),
        "explore_rate": selection.policy.explore_probability(record.step),
        "count_entropy": count_entropy(selection.update_counts),
        "blocks": float(len(record.blocks)),
        "share_of_parameters": updated / total,
        "saved_gradient_bytes": 0.0 if explore else float(_gradient_bytes_outside(selection, record.blocks)),
        "saved_state_bytes": float((total - updated) * ADAM_BYTES_PER_ELEMENT),
    }


def block_counts(selection: Selection) -> dict[str, float]:
    """``block_counts/NAME`` of every block: how many steps updated it."""
    return {
        f"block_counts/{block.name}": float(count)
        for block, count in zip(selection.blocks, selection.update_counts, strict=True)
    }


def block_shares(selection: Selection, num_steps: int) -> dict[str, float]:
    """``selected/NAME`` of every block: the share of the last ``num_steps`` steps that updated it; for one, 1 or 0.

    At most the `selection.TAIL_STEPS` steps that the history has.
    """
    last = selection.history[-num_steps:] if num_steps > 0 else []
    return {
        f"selected/{block.name}": sum(block.index in record.blocks for record in last) / max(1, len(last))
        for block in selection.blocks
    }


def count_entropy(counts: tuple[int, ...]) -> float:
    """Return the entropy of the shares of ``counts`` over its maximum, ln(len(counts)): 1 if equal, 0 for one."""
    total = sum(counts)
    if total == 0 or len(counts) < 2:
        return 0.0
    shares = [count / total for count in counts if count]
    return sum(share * math.log(1 / share) for share in shares) / math.log(len(counts))


def _gradient_bytes_outside(selection: Selection, blocks: tuple[int, ...]) -> int:
    updated = set(blocks)
    return sum(
        parameter.numel() * parameter.element_size()
        for block in selection.blocks
        if block.index not in updated
        for parameter in (selection.parameters[name] for name in block.parameter_names)
    )
