"""Write docs/scaling.md from the estimator: python launch/scaling.py --output docs/scaling.md (`make docs`).

Bytes are the estimator's, link times are those bytes by assumed rates: arithmetic, not measurements.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig, read_ds_config
from ds_agsel.estimate.activations import activations_of
from ds_agsel.estimate.cards import H100, NETWORK_BYTES_PER_SECOND, NVME_BYTES_PER_SECOND
from ds_agsel.estimate.memory import Memory, full_memory, selective_memory
from ds_agsel.estimate.models import build_on_meta
from ds_agsel.estimate.setup import Device, Setup, read_setup
from ds_agsel.estimate.shapes import ModelShape, read_shape
from ds_agsel.estimate.steps import Step, full_step, typical_step, weighted
from ds_agsel.estimate.table import Estimate, as_text, estimate
from ds_agsel.estimate.traffic import TrafficBytes, full_traffic, selective_traffic
from ds_agsel.lottery import build_lottery

from ..texts import GIB, markdown_head, markdown_row
from .output import add_output, put

ROOT = Path(__file__).parents[2]
MODELS = (
    "qwen2.5-0.5b", "llama-3.2-1b", "phi-4-mini", "llama-2-7b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b",
)  # fmt: skip
RANKS = (1, 4, 8, 64)
RANKS_PER_NODE = 8
PERCENTAGES = (10, 20, 30)
TOKENS = 4096  # per rank and step
BUCKET_NUMEL = 50_000_000
HOST_MEMORY_BYTES_PER_SECOND = 200e9  # of a node, shared by its ranks; one alone is taken to reach half of it
ADAM_BYTES = 28  # that CPU Adam reads and writes for each element
CARD_BYTES = 24 * GIB
SEVEN_B = ROOT / "configs" / "zero2_7b_24gb.json"
SEVEN_B_MODEL, SEVEN_B_SEQUENCE = "llama-2-7b", 512


@dataclass(frozen=True)
class Way:
    """Full fine-tuning (``percent`` None) or an exploit step of ds_agsel, both with CPU offload of the optimizer."""

    model: ModelShape
    setup: Setup
    percent: float | None
    step: Step
    trained_numel: int
    memory: Memory
    traffic: TrafficBytes

    def link_seconds(self) -> dict[str, float]:
        """Return the seconds that each part of the machine needs by itself, all of them working at once."""
        ranks, traffic = self.setup.ranks, self.traffic
        wire = NETWORK_BYTES_PER_SECOND if ranks > RANKS_PER_NODE else H100.nvlink_bytes
        sharers = min(max(ranks, 2), RANKS_PER_NODE)
        passes = 2 if self.setup.stage == 2 else 1  # stage 2 reduces by all-reduce (use_multi_rank_bucket_allreduce)
        collective = (traffic.gathered + passes * traffic.reduced) * (ranks - 1) / ranks
        return {
            "compute": self._products() / H100.flops,
            "network" if ranks > RANKS_PER_NODE else "NVLink": collective / wire,
            "PCIe": max(traffic.h2d, traffic.d2h) / H100.link_bytes,
            "host Adam": self.trained_numel / ranks * ADAM_BYTES * sharers / HOST_MEMORY_BYTES_PER_SECOND,
            "NVMe": (traffic.nvme_read + traffic.nvme_write) / NVME_BYTES_PER_SECOND,
        }

    def limit(self) -> tuple[str, float]:
        """Return the slowest part and its seconds: no step can be shorter."""
        return max(self.link_seconds().items(), key=lambda link: link[1])

    def _products(self) -> float:
        """Return a step's operations: two per weight and token in forward, in backward, and for the gradient."""
        if self.percent is None:
            return 6 * TOKENS * self.model.numel
        numels = [block.numel for block in self.model.blocks]
        reached = sum(share * numel for share, numel in zip(self.step.in_backward, numels, strict=True))
        return 2 * TOKENS * float(self.model.numel + reached + self.trained_numel)


_shape = cache(read_shape)


@cache
def ways(name: str, stage: int, ranks: int, offload: Device = "cpu") -> dict[float | None, Way]:
    """Return full fine-tuning and ds_agsel at each percentage, on rank 0."""
    model = _shape(name)
    setup = Setup(stage=stage, ranks=ranks, offload_optimizer=offload, reduce_bucket_numel=BUCKET_NUMEL)
    groups, frozen = model.user_groups, model.frozen
    full = Way(
        model, setup, None, full_step(len(groups)), model.numel, full_memory(groups, frozen, setup),
        full_traffic(groups, frozen, setup),
    )  # fmt: skip
    found: dict[float | None, Way] = {None: full}
    numels = tuple(block.numel for block in model.blocks)
    for percent in PERCENTAGES:
        lottery = build_lottery(model.blocks, SelectionConfig(select_percent=percent))
        step = typical_step(numels, lottery, "exploit", "expected", streaming=False)
        found[percent] = Way(
            model, setup, percent, step, round(weighted(step.selected, numels)),
            selective_memory(model, setup, "host", step), selective_traffic(model, setup, "host", step),
        )  # fmt: skip
    return found


def page() -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            "# Scale on paper",
            "",
            "`launch/pages/scaling.py` wrote this page from the estimator (`make docs`). Bytes are exact where",
            "`ds_agsel/estimate/memory.py` says so; times are those bytes by **assumed** rates. Nothing here "
            "was measured.",
            "",
            "bf16 weights, fp32 master weights and moments, `offload_optimizer` cpu, one micro-step, a reduction "
            f"bucket of {BUCKET_NUMEL // 10**6} M",
            "elements, activations left out. ds_agsel: an exploit step on blocks drawn uniformly, expected bytes. "
            "Explore steps reduce",
            "the gradients of all blocks, as full fine-tuning does, copy with ZeRO-2 those of the selected alone, with "
            "ZeRO-3 as many at most,",
            "and write back the selected; by default they are about a fifth of epoch 1 and none after it.",
            "",
            *_memory_section(),
            *_traffic_section(),
            *_limit_section(),
            *_nvme_section(),
            *_seven_b_section(),
        ]
    )


def _cases(stage: int) -> Iterator[tuple[str, int, dict[float | None, Way]]]:
    for name in MODELS:
        for ranks in RANKS:
            yield name, ranks, ways(name, stage, ranks)


def _memory_section() -> Iterator[str]:
    yield "## GiB per rank: accelerator / host"
    for stage in (2, 3):
        yield ""
        yield from _head(f"ZeRO-{stage}", ["full", *(f"{percent} %" for percent in PERCENTAGES)])
        for name, ranks, found in _cases(stage):
            cells = [_gib(way.memory.accelerator.total, way.memory.host.total) for way in _in_order(found)]
            yield _line(name, ranks, cells)
    yield ""
    yield from [
        "Master weights and moments stay on the host for every block, so that what ds_agsel saves there are gradients",
        "(4 bytes an element with ZeRO-2, 6 with ZeRO-3). On the accelerator the weights are what is left.",
        "",
    ]


def _traffic_section() -> Iterator[str]:
    yield "## GiB per step and rank: all-gather / reduce-scatter / H2D / D2H"
    for stage in (2, 3):
        yield ""
        yield from _head(f"ZeRO-{stage}", ["full", *(f"{percent} %" for percent in PERCENTAGES)])
        for name, ranks, found in _cases(stage):
            traffic = [way.traffic for way in _in_order(found)]
            yield _line(name, ranks, [_gib(t.gathered, t.reduced, t.h2d, t.d2h) for t in traffic])
    yield ""


def _limit_section() -> Iterator[str]:
    yield from [
        "## Which part is the limit",
        "",
        f"Seconds that the slowest part needs by itself, with {TOKENS} tokens per rank, and which it is. Assumed: "
        f"{H100.flops / 1e12:.0f} TFLOPS;",
        f"PCIe {H100.link_bytes / 1e9:.0f} GB/s each way; NVLink {H100.nvlink_bytes / 1e9:.0f} GB/s up to "
        f"{RANKS_PER_NODE} ranks, a network of {NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s beyond;",
        f"{HOST_MEMORY_BYTES_PER_SECOND / 1e9:.0f} GB/s of host memory, shared by a node's ranks (half of it for one), "
        f"for CPU Adam's {ADAM_BYTES} bytes an element.",
        f"The last column is ds_agsel at {PERCENTAGES[0]} % over full, were everything else hidden behind the slowest.",
    ]
    for stage in (2, 3):
        yield ""
        yield from _head(f"ZeRO-{stage}", ["full", *(f"{percent} %" for percent in PERCENTAGES), "ratio"])
        for name, ranks, found in _cases(stage):
            limits = [way.limit() for way in _in_order(found)]
            cells = [f"{seconds:.3f} {part}" for part, seconds in limits]
            yield _line(name, ranks, [*cells, f"{limits[1][1] / limits[0][1]:.2f}"])
    yield ""
    yield from _where_it_stops()


def _where_it_stops() -> Iterator[str]:
    """Yield sentences on the tables, with numbers taken from them."""
    yield from ["### Where ds_agsel stops helping", ""]
    for stage in (2, 3):
        ratios = {
            (name, ranks): found[PERCENTAGES[0]].limit()[1] / found[None].limit()[1]
            for name, ranks, found in _cases(stage)
        }
        (best_model, best_ranks), best = min(ratios.items(), key=lambda item: item[1])
        (worst_model, worst_ranks), worst = max(ratios.items(), key=lambda item: item[1])
        worst_way = ways(worst_model, stage, worst_ranks)[PERCENTAGES[0]]
        yield (
            f"- ZeRO-{stage}: the ratio is between {best:.2f} ({best_model}, ranks: {best_ranks}) and {worst:.2f} "
            f"({worst_model}, ranks: {worst_ranks}, limited by {worst_way.limit()[0]})."
        )
    yield from [
        "- Computing: forward, a third of full training's operations, is always whole, and backward ends at the lowest",
        "  selected block. Once compute is the limit, fewer blocks save only what backward skips.",
        "- ZeRO-3's all-gathers: forward gathers every weight whatever was selected. Where the network is the limit,",
        "  selection saves the reduce-scatter and part of backward's gathers, no more.",
        "- Memory: weights (ZeRO-2) and the host's master weights and moments do not shrink with the selection.",
        "- More ranks divide the optimizer's work already, so that PCIe and CPU Adam, which selection relieves most,",
        "  stop being the limit.",
        "",
    ]


def _nvme_section() -> Iterator[str]:
    ranks = RANKS_PER_NODE
    yield from [
        f"## ZeRO-3 with `offload_optimizer` nvme, {ranks} ranks",
        "",
        f"GiB read and written per step and rank, and the seconds at {NVME_BYTES_PER_SECOND / 1e9:.0f} GB/s per rank.",
        "",
        *markdown_head(["model", "full", *(f"{percent} %" for percent in PERCENTAGES)]),
    ]
    for name in MODELS:
        cells = []
        for way in _in_order(ways(name, 3, ranks, "nvme")):
            traffic = way.traffic
            cells.append(f"{_gib(traffic.nvme_read, traffic.nvme_write)}: {way.link_seconds()['NVMe']:.2f} s")
        yield markdown_row([name, *cells])
    yield ""


def seven_b() -> tuple[Estimate, int]:
    """Return the estimate for the 7B config, and its activations' bytes."""
    ds_config = read_ds_config(SEVEN_B)
    model = _shape(SEVEN_B_MODEL)
    tokens = (DsConfig.of(ds_config).micro_batch_size or 1) * SEVEN_B_SEQUENCE
    result = estimate(model, read_setup(ds_config), SelectionConfig(**ds_config["adagrad_select"]), [20])
    return result, activations_of(build_on_meta(SEVEN_B_MODEL)).peak_bytes(tokens, checkpointing=True)


def _seven_b_section() -> Iterator[str]:
    result, activations = seven_b()
    model, setup = result.model, result.setup
    ours = [row for row in result.rows if (row.method, row.stepping) == ("ds_agsel", "host")]
    fullest = max(row.memory.accelerator.total for row in ours) / GIB
    alone = full_memory(model.user_groups, (), setup.but(offload_optimizer="none")).accelerator.total / GIB
    zero3 = setup.but(stage=3, offload_param="cpu", max_live_numel=0)
    spread = next(
        row for row in estimate(model, zero3, SelectionConfig(), [20]).rows
        if (row.method, row.stepping) == ("ds_agsel", "host")
    )  # fmt: skip
    yield from [
        f"## A 7B model on one 24 GB card: `configs/{SEVEN_B.name}`",
        "",
        f"{model.name}, with `--gradient-checkpointing` and `--sequence-length {SEVEN_B_SEQUENCE}`. Without offload, "
        f"full fine-tuning takes {alone:.1f} GiB.",
        f"ZeRO-2 with the optimizer on the host leaves weights and buffers, at most {fullest:.1f} GiB, on the card; "
        "activations and",
        f"logits are about {activations / GIB:.1f} GiB: {fullest + activations / GIB:.1f} of "
        f"{CARD_BYTES / GIB:.0f} GiB. What must be large is the host: "
        f"{max(row.memory.host.total for row in ours) / GIB:.0f} GiB on explore steps.",
        f"ZeRO-3 with `offload_param` cpu as well would leave {spread.memory.accelerator.total / GIB:.1f} GiB on the "
        f"card, for {spread.traffic.h2d / GIB:.0f} GiB of H2D in a step instead of",
        f"{ours[0].traffic.h2d / GIB:.1f}: worth it only for what does not fit like this. More micro-steps cost PCIe "
        "traffic: ZeRO-Offload",
        "sums them on the host.",
        "",
        "```",
        as_text(result),
        "```",
        "",
    ]


def _in_order(found: dict[float | None, Way]) -> list[Way]:
    return [found[key] for key in (None, *PERCENTAGES)]


def _head(title: str, columns: Sequence[str]) -> list[str]:
    return markdown_head([title, "ranks", *columns])


def _line(name: str, ranks: int, cells: Sequence[str]) -> str:
    return markdown_row([name, str(ranks), *cells])


def _gib(*amounts: int) -> str:
    return " / ".join(f"{amount / GIB:.{1 if amount >= GIB / 10 else 2}f}" for amount in amounts)


def main() -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    put(page(), parser.parse_args().output)


if __name__ == "__main__":
    main()
