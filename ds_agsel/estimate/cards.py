"""Rates of accelerators, assumed: data sheets' peaks times the part that programs reach. Nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

MATMUL_SHARE = 0.4  # of the peak: reported for well-tuned training of dense transformers
MEMORY_SHARE = 0.8
LINK_SHARE = 0.8  # PCIe: 24.8 of 31.5 GB/s with nvbandwidth on PCIe 4.0 x16 (forums.developer.nvidia.com, topic 352186)
COPY_LATENCY_SECONDS = 10e-6
NVLINK_BYTES_PER_SECOND = 450e9  # one direction of an H100's 900 GB/s
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gb/s for each accelerator between nodes
NVME_BYTES_PER_SECOND = 6e9  # one PCIe 4.0 x4 drive


@dataclass(frozen=True)
class Card:
    """An accelerator's rates, per second, shares taken already. ``source`` says where the peaks are from."""

    name: str
    source: str
    flops: float
    memory_bytes: float
    link_bytes: float
    latency_seconds: float = COPY_LATENCY_SECONDS
    nvlink_bytes: float = NVLINK_BYTES_PER_SECOND


def _card(name: str, source: str, peak_flops: float, peak_memory_bytes: float, peak_link_bytes: float) -> Card:
    return Card(name, source, peak_flops * MATMUL_SHARE, peak_memory_bytes * MEMORY_SHARE, peak_link_bytes * LINK_SHARE)


# PCIe peaks: 16 lanes of 16 or 32 GT/s, 128 of 130 bits, one direction.
A6000 = _card(
    "A6000",
    "NVIDIA RTX A6000 data sheet: 154.8 TFLOPS bf16 (dense, half of the sparse 309.7), 768 GB/s, PCIe 4.0 x16",
    154.8e12, 768e9, 31.5e9,
)  # fmt: skip
H100 = _card(
    "H100",
    "NVIDIA H100 SXM5 data sheet: 989.4 TFLOPS bf16 (dense), 3.35 TB/s, PCIe 5.0 x16",
    989.4e12, 3.35e12, 63.0e9,
)  # fmt: skip
CARDS = (A6000, H100)
