"""Plain DeepSpeed as the tests compare with it: its older releases with the mends without which two CPU ranks fail."""

from __future__ import annotations

import functools
from typing import Any

UNPINNED = "DeepSpeed until 0.18.9 swaps what is 1 MiB or larger from page-locked memory alone, which no CPU has"
LOST = "plain DeepSpeed until 0.18.9 loses the gradients between the first and the last micro-step"


def initialize_plain(**arguments: Any) -> Any:
    """The engine of `deepspeed.initialize`. Until 0.19.7 ZeRO-3's bits differ from run to run, unless it is mended."""
    import deepspeed

    from ds_agsel.zero import compat

    mend_plain_0189()
    engine = deepspeed.initialize(**arguments)[0]
    if engine.zero_optimization_stage() == 3:
        compat.complete_gathers(engine.module.parameters())
    return engine


@functools.cache
def mend_plain_0189() -> None:
    """Let plain DeepSpeed 0.18.7 to 0.18.9 gather weights on two ranks: its flat weights have an autograd history."""
    from ds_agsel.zero.compat import DeepSpeedZeroOptimizer
    from ds_agsel.zero.compat.older import without_history_until_0189
    from ds_agsel.zero.compat.versions import until

    if not until("0.18.9"):
        return
    link = DeepSpeedZeroOptimizer._link_all_hp_params

    def mended(zero: Any) -> None:
        without_history_until_0189(zero)
        link(zero)

    DeepSpeedZeroOptimizer._link_all_hp_params = mended


def loses_gradients(case: Any) -> bool:
    """Whether plain DeepSpeed loses gradients of ``case``, as `LOST` says. Stage 1 reduces once, and loses none."""
    from ds_agsel.zero.compat.versions import until

    return until("0.18.9") and case.stage == 2 and case.offload == "cpu" and case.accumulation > 2


def swaps_page_locked_memory_alone() -> bool:
    """Whether DeepSpeed ends as NVMe offload of large tensors is made on a CPU, as `UNPINNED` says: an assertion."""
    from ds_agsel.zero.compat.versions import until

    return until("0.18.9")
