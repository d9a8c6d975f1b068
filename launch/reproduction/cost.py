"""Estimate the cells of a plan on one card: bytes from the estimator, time from counted operations.

Nothing here is measured on a GPU. Rates are `ds_agsel.estimate.cards`', assumed; the second number of hours takes the
ratios that the benchmark measured on a CPU instead of the counted ones.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig, read_ds_config
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.activations import Activations, activations_of
from ds_agsel.estimate.cards import CARDS, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE, Card
from ds_agsel.estimate.models import build_on_meta
from ds_agsel.estimate.setup import Setup, read_setup
from ds_agsel.estimate.shapes import ModelShape, read_shape
from ds_agsel.estimate.table import Estimate, Row, estimate
from ds_agsel.estimate.timeline import simulate
from ds_agsel.policies import num_selected

from . import plan as plans
from .plan import Cell, Cost, MethodEntry, SweepPlan, Variation
from .running import ROOT

_ADAM_BYTES = 28  # that AdamW reads and writes for each element
_HOST_BYTES_PER_SECOND = 100e9  # assumed for CPU Adam, as in docs/scaling.md
_EXPLORES, _EXPLOITS = "explore", "exploit"
_shape = cache(read_shape)


@cache
def _activations(model: str) -> Activations:
    return activations_of(build_on_meta(model))


@dataclass(frozen=True)
class Price:
    """A method's cells for one model; seconds and hours are a run's. None: the estimator does not know the method."""

    model: str
    method: str
    runs: int
    accelerator_bytes: int | None
    step_seconds: float | None
    hours: float | None
    hours_by_measured_ratio: float | None


@dataclass(frozen=True)
class _Work:
    """What a cell's step is made of."""

    shape: ModelShape
    setup: Setup
    config: dict[str, Any]
    options: plans.Options
    tokens: int
    card: Card

    @property
    def checkpointed(self) -> bool:
        return bool(self.options.get("gradient-checkpointing"))

    @property
    def forward_seconds(self) -> float:
        return 2 * self.tokens * self.shape.numel / self.card.flops


def prices(plan: SweepPlan, cells: Sequence[Cell]) -> list[Price]:
    """Return one for each model and method among ``cells``. Raises ConfigError if the plan has no ``cost``."""
    if plan.cost is None:
        raise ConfigError(f"{plan.name} has no section cost. Add one, as configs/paper/full.yaml has.")
    found = []
    for model, method in dict.fromkeys((cell.model, cell.method) for cell in cells):
        own = [cell for cell in cells if (cell.model, cell.method) == (model, method)]
        steps = own[0].steps
        work = _work(plan, plan.cost, model, method)
        seconds = _step_seconds(plan.cost, work, plan.methods[method])
        by_ratio = _by_measured_ratio(plan.cost, work, plan.methods[method])
        found.append(
            Price(
                model, method, len(own), _accelerator_bytes(work, plan.methods[method]), seconds,
                None if seconds is None else steps * seconds / 3600,
                None if by_ratio is None else steps * by_ratio / 3600,
            )
        )  # fmt: skip
    return found


def _work(plan: SweepPlan, cost: Cost, model: str, method: str) -> _Work:
    wanted, chosen = plan.models[model], plan.methods[method]
    variation = wanted.methods.get(method, Variation())
    options = {**plan.options, **wanted.options, **chosen.options, **variation.options}
    path = variation.deepspeed_config or chosen.deepspeed_config or plan.deepspeed_config
    config = read_ds_config(ROOT / path)
    rows = int(options.get("micro-batch-size") or DsConfig.of(config).micro_batch_size or 1)
    accumulation = int(options.get("accumulation") or DsConfig.of(config).accumulation_steps or 1)
    card = next((card for card in CARDS if card.name == cost.card), None)
    if card is None:
        raise ConfigError(f"cost.card={cost.card!r} is none of {', '.join(card.name for card in CARDS)}.")
    setup = read_setup(config).but(accumulation_steps=accumulation)
    tokens = rows * accumulation * cost.tokens_per_row
    return _Work(_shape(wanted.shape or wanted.model), setup, config, options, tokens, card)


# -- time


def _rank(method: MethodEntry) -> int:
    return int(method.method_options["rank"] or 0)


def _step_seconds(cost: Cost, work: _Work, method: MethodEntry) -> float | None:
    again = work.forward_seconds if work.checkpointed else 0.0
    if method.method == "full":
        return _full_seconds(work) + again
    if method.method == "lora":
        adapters = sum(work.shape.lora(_rank(method)))
        return 2 * work.forward_seconds + again + 6 * work.tokens * adapters / work.card.flops
    if method.method != "adagrad_select":
        return None
    explores = _explore_share(cost, method)
    of = {phase: _selective_seconds(work, phase) for phase in (_EXPLORES, _EXPLOITS)}
    return explores * of[_EXPLORES] + (1 - explores) * of[_EXPLOITS] + again


def _full_seconds(work: _Work) -> float:
    numel = work.shape.numel
    computing = 3 * work.forward_seconds
    if work.setup.offload_optimizer == "none":
        return computing + numel * _ADAM_BYTES / work.card.memory_bytes
    link = 2 * work.setup.item_bytes * numel / work.card.link_bytes  # gradients out, weights in
    return computing + link + numel * _ADAM_BYTES / _HOST_BYTES_PER_SECOND


def _selective_seconds(work: _Work, phase: Any) -> float:
    k = num_selected(_percent(work), len(work.shape.blocks))
    visiting = simulate(work.shape, work.setup.but(offload_optimizer="none"), work.card, k, work.tokens, phase)
    if work.setup.offload_optimizer == "none":
        return visiting.step_seconds
    selected = work.shape.numel * k / len(work.shape.blocks)
    moved = work.setup.item_bytes * (selected + (work.shape.numel if phase == _EXPLORES else selected))
    host = moved / work.card.link_bytes + selected * _ADAM_BYTES / _HOST_BYTES_PER_SECOND
    return visiting.step_seconds - visiting.exposed_seconds + host


def _percent(work: _Work) -> float:
    return float(work.options.get("select-percent") or work.config["adagrad_select"]["select_percent"])


def _explore_share(cost: Cost, method: MethodEntry) -> float:
    """Return the share of explore steps. ε falls to 1 % by the end of epoch 1 and is 0 after it."""
    policy = method.options.get("policy", "adagrad_select")
    if policy == "adagrad_select":
        first_epoch = (1 - 0.01) / math.log(100)
        return first_epoch / max(1.0, cost.epochs)
    return 1.0 if policy == "gradient_topk" else 0.0


def _by_measured_ratio(cost: Cost, work: _Work, method: MethodEntry) -> float | None:
    ratios = cost.measured_step_ratios.get(f"{_percent(work):g}") if method.method == "adagrad_select" else None
    if ratios is None or not {_EXPLORES, _EXPLOITS} <= set(ratios):
        return None
    explores = _explore_share(cost, method)
    full = _full_seconds(_Work(**{**vars(work), "setup": work.setup.but(offload_optimizer="none")}))
    again = work.forward_seconds if work.checkpointed else 0.0
    return (explores * ratios[_EXPLORES] + (1 - explores) * ratios[_EXPLOITS]) * (full + again)


# -- memory


def _accelerator_bytes(work: _Work, method: MethodEntry) -> int | None:
    section = work.config.get("adagrad_select") or {}
    result = _estimate(work, section)
    if method.method == "full":
        rows = [row for row in result.rows if row.method == "full"]
    elif method.method == "lora":
        rows = [row for row in result.rows if row.lora_rank == _rank(method)]
    elif method.method == "adagrad_select":
        rows = [row for row in result.rows if _is_ours(row, work, section, method)]
    else:
        return None
    held = max((row.memory.accelerator.total for row in rows), default=None)
    return None if held is None else held + _activation_bytes(work)


def _estimate(work: _Work, section: dict[str, Any]) -> Estimate:
    return estimate(work.shape, work.setup, SelectionConfig(**section), [_percent(work)])


def _is_ours(row: Row, work: _Work, section: dict[str, Any], method: MethodEntry) -> bool:
    stepping = "host" if work.setup.offload_optimizer != "none" else section.get("step_device") or "resident"
    phases = {"gradient_topk": {_EXPLORES}, "adagrad_select": {_EXPLORES, _EXPLOITS}}
    policy = str(method.options.get("policy", "adagrad_select"))
    return (
        row.method == "ds_agsel"
        and row.stepping == ("host" if stepping == "cpu" else stepping)
        and row.which == "worst"
        and row.phase in phases.get(policy, {_EXPLOITS})
    )


def _activation_bytes(work: _Work) -> int:
    tokens = work.tokens // work.setup.accumulation_steps
    return _activations(work.shape.name).peak_bytes(tokens, checkpointing=work.checkpointed)


# -- the page

_HOW = (
    "runs every cell below in a process of its own, goes on after one that fails, and where it was when it is started "
    "again. `--only 'final/llama-3.2-1b/*'` runs some; `--model llama-3.2-1b=FOLDER` takes a model from here, "
    "otherwise models and data come from the hub."
)
_WHAT = (
    "Bytes: `ds_agsel/estimate`, the largest step, with activations as counted by `activations.py`. Hours: training "
    "steps alone, without evaluation, validation and start. *By measured ratio*: full fine-tuning's counted hours "
    "times the step ratios to plain DeepSpeed that the README's benchmark measured, on a CPU, at 20 %."
)


def page(plan: SweepPlan, command: str) -> str:
    """Return docs/reproduction.md: the exact command, and its expected cost."""
    return "\n".join(_page(plan, command))


def _page(plan: SweepPlan, command: str) -> Iterator[str]:
    cost = plan.cost
    found = prices(plan, plans.final_cells(plan))
    search = prices(plan, plans.search_cells(plan))
    assert cost is not None  # prices has refused it
    card = next(card for card in CARDS if card.name == cost.card)
    yield from [
        "# The paper's experiments at full scale",
        "",
        "**An estimate: no GPU has run this.** `launch/reproduce.py --cost` wrote it (`make docs`).",
        "",
        "```",
        command,
        "```",
        "",
        *textwrap.wrap(_HOW, 120),
        "",
        *textwrap.wrap(plan.about.strip(), 120),
        "",
        *textwrap.wrap(
            f"Assumed: one {cost.card} ({cost.card_gigabytes:g} GB); {card.source}; of these peaks {MATMUL_SHARE:.0%} "
            f"of arithmetic, {MEMORY_SHARE:.0%} of memory, {LINK_SHARE:.0%} of PCIe; {cost.tokens_per_row} tokens a "
            f"row with its padding, {plan.steps} steps, {cost.epochs:g} epochs. {_WHAT}",
            120,
        ),
        "",
    ]
    columns = ["model", "method", "runs", f"GiB of {cost.card_gigabytes * 1e9 / 2**30:.1f}", "s a step", "hours a run"]
    yield "| " + " | ".join([*columns, "hours a run by measured ratio"]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for price in found:
        cells = [
            price.model, plan.label(price.method), str(price.runs), _gib(cost, price.accelerator_bytes),
            _number(price.step_seconds, 3), _number(price.hours, 2),
            _number(price.hours_by_measured_ratio, 2),
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"
    (runs, hours), (short_runs, short_hours) = map(_total, (found, search))
    yield from [
        "",
        f"In all {runs} runs of {hours:.0f} hours, and {short_runs} short runs of {short_hours:.0f} hours that choose "
        "learning rates.",
        "",
    ]


def _total(found: Sequence[Price]) -> tuple[int, float]:
    return sum(price.runs for price in found), sum(price.runs * (price.hours or 0) for price in found)


def _gib(cost: Cost, count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.1f}" + (" **does not fit**" if count > cost.card_gigabytes * 1e9 else "")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
