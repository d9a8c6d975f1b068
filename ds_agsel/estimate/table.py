"""The estimate itself: one row per way of training, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

from ds_agsel.config import SelectionConfig
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.memory import BUILT, Bytes, Features, Memory, Stepping, full_memory, selective_memory
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import ModelShape, Numels
from ds_agsel.estimate.steps import Which, typical_step, weighted
from ds_agsel.estimate.traffic import TrafficBytes, full_traffic, selective_traffic
from ds_agsel.lottery import Lottery, build_lottery
from ds_agsel.selection import Phase

JSON_VERSION = 2  # 2: with "rounding" among the bytes
LORA_RANKS = (128, 256)
GIB = 2**30
_KINDS = ("weights", "gradients", "master_weights", "states", "staging", "rounding", "total")


@dataclass(frozen=True)
class Row:
    """One way of training, on the rank that holds most.

    Attributes:
        method: "full", "ds_agsel" or "lora".
        stepping: where AdamW's states are and are stepped; see `memory.selective_memory`.
        phase, which: of a step of ds_agsel; None otherwise.
        trained_numel: elements that a step updates, on all ranks together.
        paper_bytes: optimizer states on the accelerator by the paper's formula, 2 · P_selected · 4 bytes, divided
            among the ranks.
    """

    label: str
    method: str
    stepping: Stepping
    select_percent: float | None
    num_selected: int | None
    lora_rank: int | None
    phase: Phase | None
    which: Which | None
    trained_numel: int
    paper_bytes: int
    memory: Memory
    traffic: TrafficBytes


@dataclass(frozen=True)
class Estimate:
    """The rows of an estimate for one model and setup."""

    model: ModelShape
    setup: Setup
    rows: tuple[Row, ...]


def estimate(
    model: ModelShape,
    setup: Setup,
    config: SelectionConfig,
    percentages: Sequence[float],
    features: Features = BUILT,
) -> Estimate:
    """Rows for plain full fine-tuning, ds_agsel at each of ``percentages``, and LoRA on all linear layers.

    Raises ConfigError for a percentage outside (0, 100] and for names in always_select or never_select that are no
    block's.
    """
    for percent in percentages:
        if not 0 < percent <= 100:
            raise ConfigError(f"--select-percent {percent:g} is outside (0, 100]. Use 100 to train every block.")
    setup = with_section(setup, config)
    others = model.dense or model
    rows = [_full_row(others, setup)]
    for percent in percentages:
        lottery = build_lottery(model.blocks, config.model_copy(update={"select_percent": percent}))
        for stepping in steppings(setup):
            rows += _selective_rows(model, setup, lottery, percent, stepping, features, config)
    rows += [_lora_row(others, setup, rank) for rank in LORA_RANKS if others.linears]
    return Estimate(model, setup, tuple(rows))


def with_section(setup: Setup, config: SelectionConfig) -> Setup:
    """Return ``setup`` with what the section says of states."""
    return setup.but(
        keep_master=config.keep_master,
        state_budget_bytes=config.state_budget_bytes,
        on_reentry=config.on_reentry,
        state_dtype=config.state_dtype,
        master_weights=config.master_weights,
    )


def steppings(setup: Setup) -> tuple[Stepping, ...]:
    """Return the ways of stepping that ``setup`` allows, or would with its `offload_optimizer` set."""
    if setup.offload_optimizer == "nvme":
        return ("host",)
    return ("host", "accelerator") if setup.offload_optimizer == "cpu" else ("resident", "host", "accelerator")


def _setup_for(setup: Setup, stepping: Stepping) -> Setup:
    if stepping == "host":
        return setup if setup.offload_optimizer != "none" else setup.but(offload_optimizer="cpu")
    return setup.but(offload_optimizer="none")


def _full_row(model: ModelShape, setup: Setup) -> Row:
    return _plain_row("full fine-tuning", "full", None, model.user_groups, model.frozen, setup)


def _lora_row(model: ModelShape, setup: Setup, lora_rank: int) -> Row:
    base = (*(numel for group in model.groups for numel in group), *model.frozen)
    return _plain_row(f"LoRA r={lora_rank}", "lora", lora_rank, [model.lora(lora_rank)], base, setup)


def _plain_row(
    label: str, method: str, lora_rank: int | None, groups: Sequence[Numels], frozen: Numels, setup: Setup
) -> Row:
    trained = sum(map(sum, groups))
    return Row(
        label=label,
        method=method,
        stepping="resident" if setup.offload_optimizer == "none" else "host",
        select_percent=None,
        num_selected=None,
        lora_rank=lora_rank,
        phase=None,
        which=None,
        trained_numel=trained,
        paper_bytes=_paper_bytes(trained, setup),
        memory=fullest_memory(setup, partial(full_memory, groups, frozen, setup)),
        traffic=_of_busiest(setup, partial(full_traffic, groups, frozen, setup)),
    )


def _selective_rows(
    model: ModelShape,
    setup: Setup,
    lottery: Lottery,
    percent: float,
    stepping: Stepping,
    features: Features,
    config: SelectionConfig,
) -> Iterator[Row]:
    setup = _setup_for(setup, stepping)
    numels = tuple(block.numel for block in model.blocks)
    one_backward = setup.accumulation_steps == 1 or config.explore_on == "first_micro_batch"
    streaming = features.streaming_top_k and setup.stage > 1 and one_backward
    cache_bytes = (setup.state_budget_bytes or 0) if setup.is_cache else 0
    staying = min(Fraction(1), Fraction(cache_bytes * setup.ranks, sum(map(setup.visiting_bytes, numels))))
    kinds: tuple[tuple[Phase, Which], ...] = tuple(product(("exploit", "explore"), ("expected", "worst")))
    for phase, which in kinds:
        step = typical_step(numels, lottery, phase, which, streaming, config.select_every, staying)
        trained = round(weighted(step.selected, numels))
        yield Row(
            label=f"{percent:g} %, {phase}, {which}",
            method="ds_agsel",
            stepping=stepping,
            select_percent=percent,
            num_selected=lottery.num_selected,
            lora_rank=None,
            phase=phase,
            which=which,
            trained_numel=trained,
            paper_bytes=_paper_bytes(trained, setup),
            memory=fullest_memory(setup, partial(selective_memory, model, setup, stepping, step, features=features)),
            traffic=_of_busiest(setup, partial(selective_traffic, model, setup, stepping, step)),
        )


def fullest_memory(setup: Setup, on: Callable[[int], Memory]) -> Memory:
    """Return the memory of the rank with most on its accelerator and, among equals, on its host.

    Ranks differ at the ends of partitions.
    """
    return max(map(on, range(setup.ranks)), key=lambda memory: (memory.accelerator.total, memory.host.total))


def _of_busiest(setup: Setup, on: Callable[[int], TrafficBytes]) -> TrafficBytes:
    return max(map(on, range(setup.ranks)), key=lambda traffic: traffic.total)


def _paper_bytes(numel: int, setup: Setup) -> int:
    return round(Fraction(2 * numel * 4, setup.ranks))


# ------------------------------------------------------------------------- output


def as_json(result: Estimate) -> dict[str, Any]:
    """Return the estimate in JSON's types. Bytes are per rank; the form changes only with ``version``."""
    setup = asdict(result.setup)
    assumed = list(setup.pop("assumed"))
    return {
        "version": JSON_VERSION,
        "model": {
            "name": result.model.name,
            "numel": result.model.numel,
            "blocks": [{"name": block.name, "numel": block.numel} for block in result.model.blocks],
        },
        "setup": setup,
        "assumed": assumed,
        "rows": [_row_as_json(row) for row in result.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    places = {"accelerator": row.memory.accelerator, "host": row.memory.host, "nvme": row.memory.nvme}
    return {
        "method": row.method,
        "stepping": row.stepping,
        "select_percent": row.select_percent,
        "num_selected": row.num_selected,
        "lora_rank": row.lora_rank,
        "phase": row.phase,
        "selection": row.which,
        "trained_numel": row.trained_numel,
        "paper_state_bytes": row.paper_bytes,
        "bytes": {place: {kind: getattr(held, kind) for kind in _KINDS} for place, held in places.items()},
        "traffic_bytes": asdict(row.traffic),
    }


def in_short(result: Estimate, card_bytes: int | None, host_bytes: int | None) -> str:
    """Return one sentence: what the largest step needs, whether that fits what there is, and what to run next.

    ``card_bytes`` and ``host_bytes`` are of a card and of the machine; None where the user has named none.
    """
    ours = [row for row in result.rows if row.method == "ds_agsel"]
    rows = [row for row in ours if (row.stepping, row.select_percent) == (ours[0].stepping, ours[0].select_percent)]
    ranks = result.setup.ranks
    card = max(row.memory.accelerator.total for row in rows)
    host = ranks * max(row.memory.host.total for row in rows)
    text = (
        f"In short: at {ours[0].select_percent:g} %, {_STEPPING_WORDS[ours[0].stepping]}, the largest step needs "
        f"{card / GIB:.1f} GiB of each card, activations not counted, and {host / GIB:.1f} GiB of host memory"
    )
    for needed, there, what in ((card, card_bytes, "of the card"), (host, host_bytes, "of host memory")):
        if there is not None:
            spare = (there - needed) / GIB
            text += f"; {spare:.1f} GiB {what} are left" if spare >= 0 else f"; {-spare:.1f} GiB {what} are missing"
    return f"{text}; next: ds-agsel fit --model {result.model.name} --card CARD --host-memory SIZE searches what fits."


def as_text(result: Estimate) -> str:
    """Return tables in GiB of each place's bytes and of a step's traffic, without rows and tables that are all 0."""
    setup, model = result.setup, result.model
    lines = [
        f"{model.name}: {model.numel / 1e6:,.1f} M parameters in {len(model.blocks)} {model.units}; "
        f"ZeRO-{setup.stage}, {setup.ranks} rank{'s' if setup.ranks > 1 else ''}, {setup.dtype}, "
        f"offload_optimizer {setup.offload_optimizer}, offload_param {setup.offload_param}, "
        f"{setup.accumulation_steps} micro-step{'s' if setup.accumulation_steps > 1 else ''}.",
        "GiB per rank, activations left out. Staging: the most that backward or an update adds for a while, and room "
        "for states that visit. Rounding: page-locked memory that torch takes beside the buffers. Paper: 2 · "
        "P_selected · 4 bytes / ranks.",
        *(f"Assumed: {note}." for note in setup.assumed),
        *_about_sparse_grad(model),
    ]
    places: dict[str, Callable[[Row], Bytes]] = {
        "On the accelerator": lambda row: row.memory.accelerator,
        "On the host": lambda row: row.memory.host,
        "On NVMe": lambda row: row.memory.nvme,
    }
    for title, held in places.items():
        on_host = title == "On the host"
        kinds = [kind for kind in _KINDS if on_host or kind != "rounding"]
        cells = [(row, [getattr(held(row), kind) for kind in kinds]) for row in result.rows if held(row).total]
        columns = [_COLUMNS.get(kind, kind) for kind in kinds]
        if title == "On the accelerator":
            columns.append("paper")
            cells = [(row, [*values, row.paper_bytes]) for row, values in cells]
        lines += _table(title, columns, cells)
    moving = [(row, [getattr(row.traffic, field) for field in _MOVED.values()]) for row in result.rows]
    lines += _table("Moved per step", tuple(_MOVED), [cells for cells in moving if any(cells[1])])
    return "\n".join(lines)


def _about_sparse_grad(model: ModelShape) -> list[str]:
    sparse = model.sparse
    if sparse is None:
        return []
    entries, numel = (sum(getattr(matrix, field) for matrix in sparse.matrices) for field in ("entries", "numel"))
    return [
        f"sparse_grad trains {entries:,} of the {numel:,} elements of {len(sparse.matrices)} matrices. Bases and "
        "energies are in staging, at most: how many directions are used is known after calibration.",
        "The first calibration steps hold the gradients of all blocks, and are no row here.",
    ]


_COLUMNS = {"gradients": "grads", "master_weights": "masters"}
_MOVED = {
    "gather": "gathered", "reduce": "reduced", "H2D": "h2d", "D2H": "d2h", "NVMe in": "nvme_read",
    "NVMe out": "nvme_write",
}  # fmt: skip
_STEPPING_WORDS = {
    "resident": "states on the accelerator",
    "host": "stepped on the host",
    "accelerator": 'step_device="accelerator"',
}


def _table(title: str, columns: Sequence[str], cells: Sequence[tuple[Row, Sequence[int]]]) -> list[str]:
    if not cells:
        return []
    lines = ["", f"{title:<34}" + "".join(f"{column:>10}" for column in columns)]
    heading = ""
    for row, values in sorted(cells, key=lambda pair: _order(pair[0])):
        trainer = "ds_agsel" if row.method == "ds_agsel" else "plain DeepSpeed"
        if heading != (heading := f"{trainer}, {_STEPPING_WORDS[row.stepping]}"):
            lines.append(heading)
        lines.append(f"  {row.label:<32}" + "".join(f"{value / GIB:>10.3f}" for value in values))
    return lines


def _order(row: Row) -> tuple[int, int]:
    return (("full", "lora", "ds_agsel").index(row.method), tuple(_STEPPING_WORDS).index(row.stepping))
