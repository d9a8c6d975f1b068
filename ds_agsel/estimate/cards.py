"""Rates of accelerators: data sheets' peaks (cards.csv) times the part that programs reach. Nothing is measured."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from ds_agsel.config import did_you_mean
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.sizes import GIB, read_bytes

MATMUL_SHARE = 0.4  # of the peak: reported for well-tuned training of dense transformers
MEMORY_SHARE = 0.8
LINK_SHARE = 0.8  # PCIe: 24.8 of 31.5 GB/s with nvbandwidth on PCIe 4.0 x16 (forums.developer.nvidia.com, topic 352186)
COPY_LATENCY_SECONDS = 10e-6
NVLINK_BYTES_PER_SECOND = 450e9  # one direction of an H100's 900 GB/s
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gb/s for each accelerator between nodes
NVME_BYTES_PER_SECOND = 6e9  # one PCIe 4.0 x4 drive

# 16 lanes of 8, 16, 32 or 64 GT/s, 128 of 130 bits, one direction.
_PCIE_BYTES_PER_SECOND = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9, 6: 126.0e9}
_BY_NUMBERS = re.compile(r"([^,]+),([\d.]+)(?:TFLOPS)?,([\d.]+)(?:GB/s)?,(?:PCIe)?([3-6])(?:\.0)?x(\d+)", re.I)


@dataclass(frozen=True)
class Card:
    """An accelerator's rates, per second, shares taken already. ``source`` says where the peaks are from.

    ``nvlink_bytes`` is one direction of a direct link between cards; 0 where they meet on PCIe.
    """

    name: str
    source: str
    flops: float
    memory_bytes: float
    link_bytes: float
    latency_seconds: float = COPY_LATENCY_SECONDS
    nvlink_bytes: float = NVLINK_BYTES_PER_SECOND
    capacity_bytes: int = 0

    @property
    def peer_bytes(self) -> float:
        """Bytes per second between cards of one node."""
        return self.nvlink_bytes or self.link_bytes


def _of_peaks(
    name: str, source: str, *, capacity_bytes: int, tflops: float, memory_gb: float, pcie: tuple[int, int],
    nvlink_gb: float,
) -> Card:  # fmt: skip
    generation, lanes = pcie
    return Card(
        name=name,
        source=source,
        flops=tflops * 1e12 * MATMUL_SHARE,
        memory_bytes=memory_gb * 1e9 * MEMORY_SHARE,
        link_bytes=_PCIE_BYTES_PER_SECOND[generation] * lanes / 16 * LINK_SHARE,
        nvlink_bytes=nvlink_gb * 1e9,
        capacity_bytes=capacity_bytes,
    )


@cache
def known_cards() -> Mapping[str, Card]:
    """Return the cards of cards.csv by their short names in lower case."""
    text = resources.files("ds_agsel.estimate").joinpath("cards.csv").read_text(encoding="utf-8")
    return {
        row["name"]: _of_peaks(
            row["title"],
            row["source"],
            capacity_bytes=int(row["memory_gib"]) * GIB,
            tflops=float(row["bf16_tflops"]),
            memory_gb=float(row["memory_gb_per_second"]),
            pcie=(int(row["pcie_generation"]), int(row["pcie_lanes"])),
            nvlink_gb=float(row["nvlink_gb_per_second"]),
        )
        for row in csv.DictReader(io.StringIO(text))
    }


def find_card(text: str) -> Card:
    """Return the card ``text``: a name in any spelling, "auto" for this machine's, or numbers.

    Numbers are memory, dense bf16 TFLOPS, GB/s of memory and PCIe: ``24GiB,165TFLOPS,1008GB/s,PCIe4x16``.

    Raises ConfigError if it is none of them.
    """
    if text.lower() == "auto":
        return _card_here()
    numbers = _BY_NUMBERS.fullmatch(text.replace(" ", ""))
    if numbers:
        memory, tflops, rate, generation, lanes = numbers.groups()
        return _of_peaks(
            text, "given by numbers", capacity_bytes=read_bytes(memory, "--card"), tflops=_positive(text, tflops),
            memory_gb=_positive(text, rate), pcie=(int(generation), round(_positive(text, lanes))), nvlink_gb=0,
        )  # fmt: skip
    found = card_named(text)
    if found is None:
        known = known_cards()
        raise ConfigError(
            f"--card={text} is not known here.{did_you_mean(text, known)} Use auto, numbers as in "
            f"24GiB,165TFLOPS,1008GB/s,PCIe4x16, or one of {', '.join(known)}."
        )
    return found


def card_named(name: str, capacity_bytes: int | None = None) -> Card | None:
    """Return the card of the table that ``name`` (a user's or a driver's) means; None if it is in none of its lines.

    Of two sizes of a card it is the one nearer to ``capacity_bytes``, else the smaller.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    parts = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    known = known_cards()
    by_length: dict[int, list[Card]] = {}
    for key, card in known.items():
        base, whole = key.partition("-")[0], key.replace("-", "")
        length = len(whole) if whole in parts else len(base) if base in parts and base not in known else 0
        by_length.setdefault(length, []).append(card)
    longest = max(by_length)
    if not longest:
        return None
    return min(by_length[longest], key=lambda card: abs(card.capacity_bytes - (capacity_bytes or 0)))


def name_here() -> str | None:
    """Return the name of this machine's accelerator; None where that is the processor, or it tells no name."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    backend: Any = getattr(torch, accelerator.device_name(), None)
    if accelerator.device_name() == "cpu" or not hasattr(backend, "get_device_name"):
        return None
    return str(backend.get_device_name(0))


def _card_here() -> Card:
    name = name_here()
    if name is None:
        raise ConfigError(
            "--card=auto: this machine's accelerator is the processor. Name a card, for example --card rtx4090."
        )
    from deepspeed.accelerator import get_accelerator

    capacity = int(get_accelerator().total_memory(0))
    found = card_named(name, capacity)
    if found is None:
        raise ConfigError(
            f"--card=auto: {name!r} is not known here. Give it by numbers, as in 24GiB,165TFLOPS,1008GB/s,PCIe4x16."
        )
    return replace(found, name=f"{found.name} (this machine's)", capacity_bytes=capacity)


def _positive(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(
            f"--card={text}: {number} is not a number above 0. Write it as in 24GiB,165TFLOPS,1008GB/s,PCIe4x16."
        )
    return value


A6000, H100 = known_cards()["a6000"], known_cards()["h100"]
CARDS = (A6000, H100)
