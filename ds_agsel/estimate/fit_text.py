"""What `ds-agsel fit` prints: a table of the best settings, the nearest misses, and one sentence."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from ds_agsel.estimate.fit import (
    CARD_RESERVE_BYTES,
    CARD_RESERVE_SHARE,
    HOST_RESERVE_BYTES,
    PROCESS_BYTES,
    Candidate,
    Found,
)
from ds_agsel.estimate.setting import AXES, HOME_WORDS, Setting
from ds_agsel.estimate.sizes import GIB

LIMIT_WORDS = {
    "compute": "computing", "pcie": "PCIe", "host_adam": "AdamW on the host", "update": "card's memory",
    "nvme": "NVMe", "ranks": "between cards",
}  # fmt: skip
PLACE_WORDS = {"card": "on the card", "host": "of host memory", "nvme": "on NVMe"}
_COLUMNS = (
    ("percent", 9), ("states", 22), ("ZeRO", 5), ("weights", 8), ("batch", 8), ("checkp.", 8), ("card GiB", 9),
    ("host GiB", 9), ("NVMe GiB", 9), ("s/step", 8), ("/plain", 7), ("limited by", 18), ("with", 0),
)  # fmt: skip


def as_text(found: Found, show: int, options: Mapping[str, str]) -> str:
    """Return the whole answer; the sentence is its last line. ``options``: the command's, for what to run next."""
    machine, job, card = found.machine, found.job, found.machine.rates.card
    lines = [
        f"{found.model.name} ({found.model.numel / 1e9:.2f} B parameters, {len(found.model.blocks)} blocks) on "
        f"{machine.ranks} x {card.name} with {card.capacity_bytes / GIB:.0f} GiB and "
        f"{machine.host_bytes / GIB:.0f} GiB of host memory; {job.tokens_per_step} tokens a step in rows of "
        f"{job.sequence_length}.",
        f"Kept free: {CARD_RESERVE_BYTES / GIB:.0f} GiB and {CARD_RESERVE_SHARE:.0%} of each card, "
        f"{HOST_RESERVE_BYTES / GIB:.0f} GiB of the host; {PROCESS_BYTES / GIB:.0f} GiB of the host are counted for "
        "each process itself.",
        "All numbers are predictions: bytes by the estimator, seconds by data sheets' rates. Nothing was measured on "
        "this card.",
        "",
    ]
    if found.fitting:
        lines += _table(shown(found.fitting, show))
        lines += [
            "s/step: mean of epoch 1; /plain: over plain DeepSpeed with the same ds_config.",
            *_lossy(found, show),
        ]
    if found.failing:
        lines += ["", f"{len(found.fitting)} settings fit, {len(found.failing)} don't. Nearest misses:"]
        lines += [f"  {describe(miss.setting)}: {over_text(miss)}" for miss in _misses(found.failing)]
    return "\n".join([*lines, "", sentence(found, options)])


def shown(candidates: Sequence[Candidate], show: int) -> list[Candidate]:
    """Return the first ``show`` of ``candidates`` that differ in percent or in where states are."""
    seen: dict[tuple[float, str], Candidate] = {}
    for candidate in candidates:
        seen.setdefault((candidate.setting.select_percent, candidate.setting.home), candidate)
    return list(seen.values())[:show]


def sentence(found: Found, options: Mapping[str, str]) -> str:
    """Return one sentence: fits or not, by how much, what to run next."""
    card, host = found.machine.rates.card.name, f"{found.machine.host_bytes / GIB:.0f} GiB of host memory"
    best = found.best
    if best is None:
        miss = found.failing[0]
        return (
            f"{found.model.name} does not fit {card} with {host}: the nearest setting ({describe(miss.setting)}) needs "
            f"{over_text(miss)}; next: {_remedy(found, miss, options)}."
        )
    spare = found.machine.spare(best.card_bytes, best.host_bytes)
    output = options.get("output")
    train = ["ds-agsel", "train", "--deepspeed_config", output or "FILE", "--model", options["model"]]
    train += ["--sequence-length", str(found.job.sequence_length)]
    train += ["--gradient-checkpointing"] if best.setting.checkpointing else []
    first = "" if output else "the same with --output FILE, then "
    return (
        f"{found.model.name} fits {card} with {host}: {describe(best.setting)}, {best.step_seconds:.1f} s a step "
        f"predicted, {spare['card'] / GIB:.1f} GiB of the card and {spare['host'] / GIB:.1f} GiB of host memory to "
        f"spare; next: {first}{shlex.join(train)} --dataset DATA --output runs/first."
    )


def describe(setting: Setting) -> str:
    """Return a setting in words."""
    words = [f"{setting.select_percent:g} %", HOME_WORDS[setting.home], f"ZeRO-{setting.stage}"]
    words += [] if setting.offload_param == "none" else [f"weights on {_place(setting.offload_param)}"]
    words += [] if setting.pin_memory else ["memory not page-locked"]
    words += [f"micro-batch {setting.micro_batch_size}"]
    words += ["checkpointing"] if setting.checkpointing else []
    return ", ".join([*words, *fields_of(setting)])


def fields_of(setting: Setting) -> list[str]:
    """Return the fields of the section that have another value than their default, apart from percent and home."""
    fields = ("keep_master", "master_weights", "state_dtype", "select_every", "on_reentry", "explore_on")
    words = [f"{field} {getattr(setting, field)}" for field in fields if getattr(setting, field) != AXES[field][0]]
    return words + {"block": [], "module": ["granularity module"], "entries": ["sparse_grad"]}[setting.unit]


def over_text(candidate: Candidate) -> str:
    """Return by how much it misses, place by place."""
    return " and ".join(f"{amount / GIB:.1f} GiB more {PLACE_WORDS[place]}" for place, amount in candidate.over.items())


def _remedy(found: Found, miss: Candidate, options: Mapping[str, str]) -> str:
    if "card" in miss.over and found.job.sequence_length > 512:
        half = found.job.sequence_length // 2
        return f"ds-agsel fit --model {options['model']} --sequence-length {half} with the other options as they are"
    if "host" in miss.over:
        enough = -(-(found.machine.host_bytes + miss.over["host"]) // GIB)
        return f"a smaller model, or a machine with {enough} GiB of host memory"
    return f"a smaller model, or --ranks {2 * found.machine.ranks}"


def _misses(failing: Sequence[Candidate]) -> list[Candidate]:
    """Return the nearest miss for each place of states."""
    nearest: dict[str, Candidate] = {}
    for candidate in failing:
        nearest.setdefault(candidate.setting.home, candidate)
    return list(nearest.values())


def _lossy(found: Found, show: int) -> list[str]:
    if not any(candidate.setting.lossy for candidate in shown(found.fitting, show)):
        return []
    return ["*: has fields by which a run learns otherwise than with their defaults: docs/section.md has them."]


def _table(candidates: Sequence[Candidate]) -> Iterator[str]:
    yield "".join(f"{name:<{width}}" for name, width in _COLUMNS).rstrip()
    for candidate in candidates:
        cells = zip(_cells(candidate), _COLUMNS, strict=True)
        yield "".join(f"{cell:<{width}}" for cell, (_, width) in cells).rstrip()


def _cells(candidate: Candidate) -> list[str]:
    setting, seconds, full = candidate.setting, candidate.seconds, candidate.full_seconds
    accumulation = candidate.accumulation_steps
    return [
        f"{setting.select_percent:g} %" + "*" * bool(setting.lossy),
        HOME_WORDS[setting.home],
        str(setting.stage),
        _place(setting.offload_param),
        f"{setting.micro_batch_size} x {accumulation}",
        "yes" if setting.checkpointing else "no",
        f"{candidate.card_bytes / GIB:.1f}",
        f"{candidate.host_bytes / GIB:.1f}",
        f"{candidate.nvme_bytes / GIB:.1f}" if candidate.nvme_bytes else "-",
        f"{candidate.step_seconds:.2f}",
        f"{candidate.step_seconds / full.total:.2f}" if full else "-",
        LIMIT_WORDS[seconds.limit] if seconds else "-",
        ", ".join(fields_of(setting)),
    ]


def _place(device: str) -> str:
    return {"none": "card", "cpu": "host", "nvme": "NVMe"}[device]
