"""Frozen parameters of a ZeRO-3 checkpoint, cut anew for another number of ranks.

DeepSpeed 0.19.8 copies a rank's saved slice of each frozen parameter to this run's slice (engine.py:4315), which fails
where the two runs have different numbers of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS
from torch import nn

from ds_agsel.zero.tag_files import TagFiles

_FILES = "*zero_pp_rank_*_mp_rank_00_model_states.pt"


def reader(files: TagFiles, load: Callable[[str], Any], model: nn.Module, rank: int) -> Callable[[str], Any]:
    """Return ``load``, whose files of model states have this rank's slices of ``model``'s frozen parameters.

    Args:
        load: reads a file of the tag.
        rank: in the group over which parameters are partitioned.
    """

    def read(path: str) -> Any:
        content = load(path)
        saved = content.get(FROZEN_PARAM_FRAGMENTS) if isinstance(content, dict) else None
        if not saved:
            return content
        parameters: dict[str, Any] = dict(model.named_parameters())
        slices = {name: p.ds_tensor for name, p in parameters.items() if name in saved and hasattr(p, "ds_id")}
        if all(saved[name].numel() == slices[name].numel() for name in slices):
            return content
        ranks = sorted(files.names(_FILES), key=lambda name: int(re.findall(r"pp_rank_(\d+)_", name)[0]))
        pieces = [load(name)[FROZEN_PARAM_FRAGMENTS] for name in ranks]
        cut = dict(saved)
        for name, own in slices.items():
            whole = torch.cat([piece[name].flatten() for piece in pieces])
            start = rank * own.numel()
            cut[name] = own.new_zeros(own.numel())
            found = whole[start : start + own.numel()]
            cut[name][: found.numel()] = found
        return {**content, FROZEN_PARAM_FRAGMENTS: cut}

    return read
