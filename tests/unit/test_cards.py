"""The table of cards, and what people and drivers call them."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_agsel.errors import ConfigError
from ds_agsel.estimate import cards
from ds_agsel.estimate.cards import card_named, find_card, known_cards
from ds_agsel.estimate.sizes import GIB, read_bytes

TABLE = Path(cards.__file__).with_name("cards.csv")


def test_every_line_has_numbers_and_a_source():
    lines = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))
    assert len({line["name"] for line in lines}) == len(lines) >= 20
    for line in lines:
        card = known_cards()[line["name"]]
        assert card.source and card.flops > 0 and card.memory_bytes > 0 and card.link_bytes > 0
        assert 8 * GIB <= card.capacity_bytes <= 256 * GIB


def test_peaks_are_taken_by_their_shares():
    card = known_cards()["rtx4090"]
    assert card.flops == pytest.approx(165.2e12 * 0.4)
    assert card.memory_bytes == pytest.approx(1008e9 * 0.8)
    assert card.link_bytes == pytest.approx(31.5e9 * 0.8)
    assert card.peer_bytes == card.link_bytes  # no NVLink
    assert known_cards()["rtx4060ti"].link_bytes == card.link_bytes / 2  # 8 lanes
    assert known_cards()["h100"].peer_bytes == 450e9


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("rtx4090", None, "rtx4090"),
        ("RTX 4090", None, "rtx4090"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("RTX-4070-Ti-Super", None, "rtx4070tisuper"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40gb"),
        ("a100", None, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA H100 PCIe", 79, "h100-pcie"),
        ("NVIDIA RTX A6000", 47, "a6000"),
        ("AMD Instinct MI300X", 191, "mi300x"),
        ("NVIDIA A10G", 22, None),  # another card than an A10
        ("Voodoo 2", None, None),
    ],
)
def test_names_of_people_and_of_drivers(name, gib, key):
    assert card_named(name, gib and gib * GIB) == (key and known_cards()[key])


@pytest.mark.parametrize(
    "text", ["24GiB,165TFLOPS,1008GB/s,PCIe4x16", "24 GiB, 165, 1008, 4x16", "24g,165,1008,4.0x16"]
)
def test_a_card_by_numbers(text):
    card = find_card(text)
    assert card.capacity_bytes == 24 * GIB
    assert (card.flops, card.link_bytes) == (pytest.approx(66e12), known_cards()["rtx4090"].link_bytes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx4909", r'--card=rtx4909 is not known here. Did you mean "rtx4090"\? Use auto, numbers as in .*, h100,'),
        ("24,165,1008,4x16", "--card=24 is not an amount of memory. Write it with its unit: 32GiB."),
        ("24GiB,0,1008,4x16", "--card=24GiB,0,1008,4x16: 0 is not a number above 0"),
        ("24GiB,1.2.3,1008,4x16", "1.2.3 is not a number above 0"),
    ],
)
def test_what_is_no_card_is_refused_in_a_sentence(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        find_card(text)
    assert "\n" not in str(caught.value)


class Backend:
    """Stands for `torch.cuda`."""

    def __init__(self, name: str) -> None:
        self.get_device_name = lambda index: name


@pytest.mark.parametrize(("name", "found"), [("NVIDIA L4", "L4"), ("NVIDIA A10G", None)])
def test_auto_is_the_machine_s_card_with_the_memory_that_it_reports(monkeypatch, name, found):
    here = SimpleNamespace(device_name=lambda: "toy", total_memory=lambda index: 22 * GIB)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: here)
    monkeypatch.setattr("torch.toy", Backend(name), raising=False)
    if found is None:
        with pytest.raises(ConfigError, match=r"'NVIDIA A10G' is not known here\. Give it by numbers"):
            find_card("auto")
    else:
        card = find_card("auto")
        assert (card.capacity_bytes, card.flops) == (22 * GIB, known_cards()["l4"].flops)


def test_auto_on_a_machine_without_one(monkeypatch):
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
    with pytest.raises(ConfigError, match="this machine's accelerator is the processor"):
        find_card("auto")


@pytest.mark.parametrize(
    ("text", "amount"), [("32GiB", 32 * GIB), ("32 GB", 32 * 10**9), ("1.5g", 3 * GIB // 2), ("512MiB", GIB // 2)]
)
def test_amounts_of_memory(text, amount):
    assert read_bytes(text, "--x") == amount


@pytest.mark.parametrize("text", ["", "32", "GiB", "-1GiB", "0GiB", "32 parsecs", "1e9GiB", "nan GiB"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ConfigError, match=f"--host-memory={text} is not an amount of memory. Write it with its unit"):
        read_bytes(text, "--host-memory")
