"""How many groups an update on an accelerator takes at once: [Note: One pass] in one_pass. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BATCH_NUMEL = 2**24  # of fp32 gradients, 64 MiB, unless one group has more


def batches(numels: Sequence[int]) -> Iterator[range]:
    """Yield groups of ``numels`` elements, in their order, in batches no larger than the largest or `BATCH_NUMEL`."""
    most = largest_batch(numels)
    start = total = 0
    for group, numel in enumerate(numels):
        if total + numel > most:
            yield range(start, group)
            start, total = group, 0
        total += numel
    yield range(start, len(numels))


def largest_batch(numels: Sequence[int]) -> int:
    """Return the most elements that a batch of `batches` can have."""
    return max(BATCH_NUMEL, *numels)
