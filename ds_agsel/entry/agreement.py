"""Compare the settings of all ranks before anything can hang; where they differ, every rank raises and names them.

[Note: By the store] Ranks that differ may not meet in the same collective, so what they compare goes through the
process group's key-value store, whose waits have a timeout: each rank posts what it was started with, rank 0
compares and posts a verdict, and a rank that never comes is named.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import nn

import ds_agsel
from ds_agsel.config import SECTION, SelectionConfig
from ds_agsel.errors import ConfigError

ARRIVAL_TIMEOUT_SECONDS = 600  # one rank may load a model long before or after another
_SHOWN_CHARACTERS = 50_000  # longer parts are compared by their sha256 alone
_PLAIN = "plain"
# Settings that may differ from rank to rank: where it reports to, and local paths.
_OF_ONE_RANK = (
    "tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger", "wall_clock_breakdown",
    "dump_state", "steps_per_print", "local_rank", "nvme_path",
)  # fmt: skip

_calls = itertools.count()


def next_call() -> int:
    """Return the number of this call of `initialize`; ranks that make the same calls get the same number."""
    return next(_calls)


def parts(ds_config: Mapping[str, Any], config: SelectionConfig, model: nn.Module) -> dict[str, Any]:
    """Return the parts of the caller's arguments that must be equal on all ranks, by name."""
    section = config.model_dump(mode="json")
    seed = section.pop("seed")
    return {
        f"{SECTION}.seed": seed,
        SECTION: {**section, "replay_file": _content(section.get("replay_file"))},
        "ds_config": _shared({key: value for key, value in ds_config.items() if key != SECTION}),
        "model": {
            name: [list(getattr(p, "ds_shape", p.shape)), str(p.dtype), p.requires_grad]
            for name, p in model.named_parameters()
        },
    }


def versions() -> dict[str, str]:
    """Return the package versions that must match on every rank, except DeepSpeed's."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"ds_agsel": ds_agsel.__version__, "torch": str(torch.__version__), "python": python}


def require(call: int, own: Mapping[str, Any], failure: str | None = None) -> None:
    """Raise ConfigError unless all ranks came to ``call`` with equal ``own``, naming what differs and where.

    ``failure``: why this rank can't start; every other rank then raises it. All ranks of the process group must call.
    """
    group = torch.distributed.group.WORLD
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world_size == 1 or group is None:
        return
    rank, store = torch.distributed.get_rank(), torch.distributed.distributed_c10d._get_default_store()
    store.set(_key(call, rank), json.dumps({"failure": failure, "parts": _described(own)}))
    patience = timedelta(seconds=ARRIVAL_TIMEOUT_SECONDS)
    if rank == 0:
        verdict = _verdict(store, call, world_size, patience)
        store.set(_key(call, "verdict"), json.dumps(verdict))
    else:
        try:
            store.wait([_key(call, "verdict")], 2 * patience)
            verdict = json.loads(store.get(_key(call, "verdict")))
        except (RuntimeError, ValueError) as error:
            verdict = f"rank 0 did not come to ds_agsel.initialize ({str(error).splitlines()[0][:200]})."
    if not verdict:
        return
    store.set(_key(call, f"told {rank}"), "")
    if rank == 0:  # this process holds the store: wait until the others have read it
        with suppress(RuntimeError):
            store.wait([_key(call, f"told {other}") for other in range(1, world_size)], timedelta(seconds=10))
    if failure is None:
        raise ConfigError(f"{verdict} Start every rank with the same script, model, ds_config and versions.")


def post_plain(call: int) -> None:
    """Tell ranks that call `require` that this one was started without the section. Does not wait."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(_key(call, torch.distributed.get_rank()), json.dumps(_PLAIN))


def _verdict(store: Any, call: int, world_size: int, patience: timedelta) -> str:
    """Return what is wrong as a sentence; "" where nothing is. Rank 0 only."""
    keys = [_key(call, rank) for rank in range(world_size)]
    with suppress(RuntimeError):
        store.wait(keys, patience)
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    if missing:
        return f"{_ranks(missing)} did not come to ds_agsel.initialize within {ARRIVAL_TIMEOUT_SECONDS} s."
    posted = [json.loads(store.get(key)) for key in keys]
    plain = [rank for rank, answer in enumerate(posted) if answer == _PLAIN]
    if plain:
        return f"{_ranks(plain)} has no enabled {SECTION} section (and trains by plain DeepSpeed), unlike rank 0."
    failed = [(rank, answer["failure"]) for rank, answer in enumerate(posted) if answer["failure"] is not None]
    if failed:
        return f"{_ranks([rank for rank, _ in failed])} can't start: {failed[0][1]}"
    return differences([answer["parts"] for answer in posted])


def differences(of_ranks: Sequence[Mapping[str, Any]]) -> str:
    """Return which parts of which ranks differ from rank 0's, as a sentence; "" where none does."""
    found = []
    for name, (digest, shown) in of_ranks[0].items():
        others: dict[str, list[int]] = {}
        for rank, described in enumerate(of_ranks):
            if described[name][0] != digest:
                others.setdefault(described[name][0], []).append(rank)
        for ranks in others.values():
            theirs = of_ranks[ranks[0]][name][1]
            where = _first_difference(theirs, shown) if shown is not None and theirs is not None else ""
            found.append(f"{name} on {_ranks(ranks)}{where}")
    return f"the ranks of this job do not agree with rank 0 on: {'; '.join(found)}." if found else ""


def _described(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return each part's sha256 and, if it is short, the part itself."""
    found = {}
    for name, part in own.items():
        text = json.dumps(part, sort_keys=True, default=_plain_value)
        short = len(text) <= _SHOWN_CHARACTERS
        found[name] = (hashlib.sha256(text.encode()).hexdigest(), json.loads(text) if short else None)
    return found


def _first_difference(theirs: Any, ours: Any, path: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            one, other = theirs.get(key, "absent"), ours.get(key, "absent")
            if one != other:
                return _first_difference(one, other, f"{path}.{key}".lstrip("."))
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for place, (one, other) in enumerate(zip(theirs, ours)):
            if one != other:
                return _first_difference(one, other, f"{path}[{place}]")
    return f" ({path + ': ' if path else ''}{str(theirs)[:100]} there, {str(ours)[:100]} on rank 0)"


def _shared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _shared(item) for key, item in value.items() if key not in _OF_ONE_RANK}
    return [_shared(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _content(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        return str(error)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _key(call: int, who: int | str) -> str:
    return f"ds_agsel/agreement/{call}/{who}"
