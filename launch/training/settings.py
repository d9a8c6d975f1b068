"""The ds_config of a run: read, its "auto" values filled in, its steps per epoch written into our section."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_agsel.config import SECTION, find_section
from ds_agsel.errors import ConfigError

from ..data.batches import Batching
from .hardware import bf16_is_fast

AUTO = "auto"
_DEFAULT_LR = 1e-4
_WARMUP_FRACTION = 0.1


def read(path: str) -> dict[str, Any]:
    """The ds_config in the file ``path``. Raises ConfigError where there is none, or no JSON object in it."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config={path!r} can't be read: {error.strerror}. Give a JSON file.") from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed_config={path!r} is not valid JSON: {error}. Mend it.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed_config={path!r} holds no JSON object. Write its settings in braces.")
    return config


def batching(config: Mapping[str, Any], world_size: int, micro_batch: int | None, accumulation: int | None) -> Batching:
    """Rows per micro-batch and accumulation steps: the command line's, else the ds_config's."""
    overridden = micro_batch is not None or accumulation is not None
    total = None if overridden else _number(config, "train_batch_size")
    micro = micro_batch or _number(config, "train_micro_batch_size_per_gpu")
    steps = accumulation or _number(config, "gradient_accumulation_steps")
    if total is not None:
        if micro is None:
            micro = total // ((steps or 1) * world_size)
        if steps is None and micro > 0:
            steps = total // (micro * world_size)
        if not micro or not steps or micro * steps * world_size != total:
            raise ConfigError(
                f"train_batch_size={total} is not micro-batch {micro} × accumulation {steps} × "
                f"{world_size} ranks. "
                "Change one, or leave train_batch_size out."
            )
    if micro is None:
        raise ConfigError(
            "The ds_config sets no batch size. Set train_micro_batch_size_per_gpu, or --micro-batch-size."
        )
    return Batching(micro, steps or 1, world_size)


def complete(
    config: Mapping[str, Any],
    *,
    batches: Batching,
    steps_per_epoch: int,
    total_steps: int,
    lr: float | None,
    seed: int,
    section: Mapping[str, Any],
) -> dict[str, Any]:
    """A copy of ``config`` with nothing left open; ``config`` is not edited.

    "auto" is filled where the run knows the value: batch sizes, the optimizer's lr (--lr, or 1e-4), the
    scheduler's warmup_max_lr, total_num_steps and warmup_num_steps (a tenth of the run). A --lr overrides the
    file's. In our own section steps_per_epoch and seed are filled where they are null, and ``section``
    overrides what it names. Raises ConfigError for an "auto" that is left elsewhere.
    """
    filled = copy.deepcopy(dict(config))
    filled.pop("train_batch_size", None)
    filled["train_micro_batch_size_per_gpu"] = batches.micro_batch
    filled["gradient_accumulation_steps"] = batches.accumulation
    optimizer = filled.get("optimizer", {}).get("params", {})
    if lr is not None or optimizer.get("lr") == AUTO:
        optimizer["lr"] = _DEFAULT_LR if lr is None else lr
    if filled.get("bf16", {}).get("enabled") == AUTO:
        filled["bf16"]["enabled"] = bf16_is_fast()
    scheduler = filled.get("scheduler", {}).get("params", {})
    known = {
        "total_num_steps": total_steps,
        "warmup_num_steps": max(2, round(_WARMUP_FRACTION * total_steps)),
        "warmup_max_lr": optimizer.get("lr"),
    }
    for name, value in known.items():
        if scheduler.get(name) == AUTO or (name == "warmup_max_lr" and name in scheduler and lr is not None):
            scheduler[name] = value
    if find_section(filled) is not None:
        ours = {**filled[SECTION], **section}
        for name, value in (("steps_per_epoch", steps_per_epoch), ("seed", seed)):
            if ours.get(name) in (None, AUTO):
                ours[name] = value
        filled[SECTION] = ours
    elif section:
        raise ConfigError(f"--select-percent and --policy need the section {SECTION!r} in the ds_config. Add it: {{}}.")
    open_settings = [path for path in _autos(filled) if not path.startswith(f"{SECTION}.")]
    if open_settings:
        raise ConfigError(f'{open_settings[0]}="auto" is not known to launch/train.py. Set its value.')
    return filled


def precision(config: Mapping[str, Any]) -> str:
    """In which numbers a complete ds_config computes: fp32, bf16, fp16 or autocast with its dtype."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled"):
            return name
    autocast = config.get("torch_autocast", {})
    return f"autocast {autocast.get('dtype', 'bfloat16')}" if autocast.get("enabled") else "fp32"


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    if value in (None, AUTO):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} is not a whole number from 1 on. Correct it, or leave it out.")
    return value


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if value == AUTO:
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _autos(inner, f"{path}.{name}" if path else str(name))
