"""Write docs/which-setting.md by the search of `ds-agsel fit`: python -m launch.pages.which_setting (`make docs`).

Everything on the page is predicted; no card was used.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache

from ds_agsel.estimate.activations import Activations, activations_of
from ds_agsel.estimate.cards import find_card
from ds_agsel.estimate.fit import Found, Job, Machine, search
from ds_agsel.estimate.fit_text import LIMIT_WORDS, describe, over_text
from ds_agsel.estimate.models import build_on_meta
from ds_agsel.estimate.prediction import Rates
from ds_agsel.estimate.setting import AXES
from ds_agsel.estimate.shapes import ModelShape, shape_of

from ..texts import GIB, markdown_head, markdown_row
from .output import add_output, put

MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-14b")
MACHINES = (("rtx3060", 32), ("rtx4060ti", 32), ("rtx4090", 64), ("l40s", 128), ("a100-80gb", 256), ("h100", 256))
JOB = Job(sequence_length=1024, tokens_per_step=16384, micro_batch_size=1)
# Less than `ds-agsel fit` tries, so that the page is made in seconds: percentages of the paper, exact settings alone.
PAGE_AXES = {
    **AXES, "select_percent": (30.0, 20.0, 10.0), "stage": (2, 3), "pin_memory": (True,), "keep_master": ("host",),
    "select_every": (1,), "master_weights": ("fp32",), "state_dtype": ("fp32",), "on_reentry": ("keep",),
    "unit": ("block",),
}  # fmt: skip


_INTRODUCTION = f"""\
# Which setting for which card

**Everything here is predicted; no card was used.** `launch/pages/which_setting.py` wrote it (`make docs`) by the search
of `ds-agsel fit` ([states.md](states.md#which-setting)): bytes by the estimator, seconds by data sheets' rates. One
card, bf16, {JOB.tokens_per_step} tokens a step in rows of {JOB.sequence_length}, micro-batch 1, 10 to 30 %, fp32
states, memory page-locked. `ds-agsel fit` itself tries more, for your card and host memory, and writes the ds_config:

```
ds-agsel fit --model llama-3.1-8b --card rtx4090 --host-memory 64GiB --output ds_config.json
```
"""


@cache
def _model(name: str) -> tuple[ModelShape, Activations]:
    model = build_on_meta(name)
    return shape_of(name, model), activations_of(model)


def found(name: str, card: str, host_gib: int) -> Found:
    """Return what fits ``name`` on one ``card`` with ``host_gib`` GiB of host memory."""
    shape, activations = _model(name)
    return search(shape, activations, Machine(Rates(find_card(card)), 1, host_gib * GIB), JOB, PAGE_AXES)


def page() -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            _INTRODUCTION,
            *markdown_head(["model", "card", "host", "setting", "card GiB", "host GiB", "NVMe GiB", "s/step", "limit"]),
            *(row for name in MODELS for row in _rows(name)),
            "",
        ]
    )


def _rows(name: str) -> Iterator[str]:
    for card, host_gib in MACHINES:
        result = found(name, card, host_gib)
        best, machine = result.best, [name, result.machine.rates.card.name, f"{host_gib} GiB"]
        if best is None:
            nearest = result.failing[0]
            yield markdown_row([*machine, f"does not fit: {over_text(nearest)}", "", "", "", "", ""])
            continue
        amounts = [f"{amount / GIB:.1f}" for amount in (best.card_bytes, best.host_bytes, best.nvme_bytes)]
        limit = LIMIT_WORDS[best.seconds.limit] if best.seconds else ""
        yield markdown_row([*machine, describe(best.setting), *amounts, f"{best.step_seconds:.1f}", limit])


def main() -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    put(page(), parser.parse_args().output)


if __name__ == "__main__":
    main()
