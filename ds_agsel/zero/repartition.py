"""Checkpoints that travel: masters and moments by parameter name, whatever rank count, stage or form they have.

[Note: By name] What a rank of this run must load is cut out of what the ranks of the saving run wrote, parameter by
parameter, and put in the form of this rank's own file; DeepSpeed's ordinary load then goes on from there. So step
counts and hyperparameters stay each block's own, where DeepSpeed's universal load gives a group those of its first
parameter, and stage 3 gives every sub-group those of the first (stage3.py:3664, 3687).

[Note: Blocks without state] A block that was never updated has no Adam state. Files say zeros and step 0 instead, as
expanded one-element zeros without storage: `ds_to_universal` (0.19.8) asks every group for its state.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from deepspeed.checkpoint import constants
from torch import Tensor

from ds_agsel.errors import CheckpointError
from ds_agsel.residency.states import MOMENTS
from ds_agsel.zero import compat
from ds_agsel.zero.states.forms import Int8Moments, form_of, in_fp32
from ds_agsel.zero.tag_files import TagFiles

MASTER = constants.FP32_WEIGHT_KEY
_LOSS_SCALE = (constants.LOSS_SCALER, "dynamic_loss_scale")
_OF_THE_RUN = (*_LOSS_SCALE, "overflow", constants.CLIP_GRAD, constants.DS_VERSION)

logger = logging.getLogger("ds_agsel")


@dataclass(frozen=True)
class Slice:
    """Elements of a parameter in a partition: ``numel`` of them, the parameter's from ``start`` on, lying at ``at``."""

    name: str
    start: int
    at: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """One group on one rank: its parameters, the length of the partition here, and what lies in it."""

    names: tuple[str, ...]
    numel: int
    slices: tuple[Slice, ...]


class SavedStates(Protocol):
    """What a checkpoint holds, by parameter name."""

    @property
    def names(self) -> Collection[str]:
        """Return the parameters that it has states of."""

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """Return the elements ``start`` to ``start + numel`` of the flat master (`MASTER`) or moment of a parameter."""

    def step(self, name: str) -> int:
        """Return how often a parameter was updated."""

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """Return those of the param group that a parameter is in."""

    @property
    def of_the_run(self) -> Mapping[str, Any]:
        """The entries common to all groups: loss scale, clipping, versions."""


def _section_keys(state_dict: Mapping[str, Any]) -> tuple[str, str]:
    if constants.BASE_OPTIMIZER_STATE in state_dict:
        return constants.BASE_OPTIMIZER_STATE, constants.SINGLE_PARTITION_OF_FP32_GROUPS
    return constants.OPTIMIZER_STATE_DICT, constants.FP32_FLAT_GROUPS


def sections(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Return (base optimizer's state_dict, masters) from a ZeRO optimizer's state_dict of any stage."""
    base, masters = _section_keys(state_dict)
    return state_dict[base], state_dict[masters]


def detach_masters(state_dict: dict[str, Any]) -> None:
    """Let the master weights in a ZeRO optimizer's state_dict of any stage outlive a change of the partitions' data."""
    state_dict[_section_keys(state_dict)[1]] = [master.detach() for master in sections(state_dict)[1]]


def add_empty_states(state_dict: Mapping[str, Any]) -> None:
    """Add zeros for blocks that were never updated; see [Note: Blocks without state]."""
    base, masters = sections(state_dict)
    paddings = state_dict.get(
        constants.GROUP_PADDINGS, [0] * len(masters)
    )  # the masters lack this tensor, the states have it
    for index, (master, padding) in enumerate(zip(masters, paddings)):
        if not base["state"].get(index):
            nothing = torch.zeros(1, dtype=master.dtype, device=master.device).expand(master.numel() + padding)
            base["state"][index] = {"step": 0, **{key: nothing for key in MOMENTS}}


def drop_empty_states(state_dict: Mapping[str, Any]) -> None:
    """Undo `add_empty_states`, so that a state exists from a block's first update on."""
    base, _ = sections(state_dict)
    base["state"] = {index: state for index, state in base["state"].items() if int(state.get("step", 1)) > 0}


def state_dict_for(
    own: Mapping[str, Any], layouts: Sequence[Layout], optimizer: torch.optim.Optimizer, saved: SavedStates
) -> dict[str, Any]:
    """Return what this rank would have saved of ``saved``: ``own``, its present state_dict, with other contents."""
    base, masters = sections(own)
    group_of = {index: group for group in base["param_groups"] for index in group["params"]}
    states, found = {}, []
    for index, layout in enumerate(layouts):
        master = torch.zeros(layout.numel, dtype=masters[index].dtype)
        found.append(master)
        _fill(master, layout, saved, MASTER)
        steps = _steps(layout, saved)
        if steps > 0:
            moments = {key: _moment(layout, saved, key) for key in MOMENTS}
            states[index] = {"step": compat.adam_step(optimizer, steps), **moments}
        of_saved = saved.hyperparameters(layout.names[0])
        group_of[index].update({key: value for key, value in of_saved.items() if key != "params"})
    new = {**own, **{key: saved.of_the_run[key] for key in _OF_THE_RUN if key in saved.of_the_run}}
    base_key, masters_key = _section_keys(own)
    return {**new, base_key: {**base, "state": states}, masters_key: found}


def _moment(layout: Layout, saved: SavedStates, key: str) -> Tensor:
    """Return this rank's part of a moment in the dtype that it was saved in; fp32 where there is none of it."""
    pieces = [saved.read(piece.name, key, piece.start, piece.numel) for piece in layout.slices]
    flat = torch.zeros(layout.numel, dtype=pieces[0].dtype if pieces else torch.float32)
    for piece, values in zip(layout.slices, pieces, strict=True):
        flat.narrow(0, piece.at, piece.numel).copy_(values)
    return flat


def convert_other_forms(
    state_dict: Mapping[str, Any], state_dtype: str, rank: int, room: Callable[[int, torch.device], Tensor]
) -> None:
    """Make moments of ``state_dict`` fp32, in ``room``, that are not in the form of this run; log it, on rank 0.

    Raises CheckpointError where a form can't be read.
    """
    states = sections(state_dict)[0]["state"]
    saved = set()
    for index, state in states.items():
        form = form_of(state)
        saved.add("fp32" if form is None else form.name)
        if form is not None and form.name != state_dtype:
            states[index] = in_fp32(state, room)
    if rank == 0 and saved - {state_dtype}:
        logger.warning(
            "adagrad_select: the moments that are loaded are %s, and state_dtype is %s: they are converted%s.",
            " and ".join(sorted(saved)), state_dtype, ", rounded to the nearest" if state_dtype != "fp32" else "",
        )  # fmt: skip


def _fill(flat: Tensor, layout: Layout, saved: SavedStates, key: str) -> None:
    for piece in layout.slices:
        flat.narrow(0, piece.at, piece.numel).copy_(saved.read(piece.name, key, piece.start, piece.numel))


def _steps(layout: Layout, saved: SavedStates) -> int:
    of_name = {name: saved.step(name) for name in layout.names}
    if len(set(of_name.values())) > 1:
        raise CheckpointError(
            f"the checkpoint has different step counts for parameters of one block: {of_name}. Load it with the "
            "adagrad_select.blocks it was saved with."
        )
    return of_name[layout.names[0]]


def _readable(states: dict[int, dict[str, Any]], index: int) -> dict[str, Any]:
    """Return the Adam state ``index``, with moments that can be cut: each element in a place of its own."""
    if form_of(states[index]) is Int8Moments:
        states[index] = in_fp32(states[index])
    return states[index]


class ZeroFiles:
    """The `*_optim_states.pt` of any number of ranks, of stages 1, 2 and 3.

    ``keeps_loss_scale``: whether the run that loads has the dtype of the one that saved; another dtype scales its loss
    otherwise.
    """

    def __init__(self, tag: TagFiles, keeps_loss_scale: bool = True) -> None:
        self._tag = tag
        self._folder = tag.folder
        self._keeps_loss_scale = keeps_loss_scale
        found = tag.names("*zero_pp_rank_*_optim_states.pt")
        by_rank = {int(re.findall(r"zero_pp_rank_(\d+)_", name)[0]): name for name in found}
        self._files = [tag.load(by_rank[rank])[constants.OPTIMIZER_STATE_DICT] for rank in sorted(by_rank)]
        if not self._files:
            raise CheckpointError(
                f"{tag.folder} has no *_optim_states.pt. Load the weights alone: load_module_only=True."
            )
        self._where: dict[str, list[tuple[int, int, Slice]]] = {}
        ends: dict[str, int] = {}
        for rank, file in enumerate(self._files):
            for index, name, at, numel in self._pieces(rank, file):
                start = ends.get(name, 0)
                self._where.setdefault(name, []).append((rank, index, Slice(name, start, at, numel)))
                ends[name] = start + numel

    @cached_property
    def _shapes(self) -> list[dict[str, torch.Size]]:
        return model_states(self._tag)[constants.PARAM_SHAPES]

    @property
    def names(self) -> Collection[str]:
        return self._where.keys()

    def _pieces(self, rank: int, file: Mapping[str, Any]) -> Iterator[tuple[int, str, int, int]]:
        """Yield (group, parameter, place in the partition, elements) of one rank."""
        if int(file[constants.ZERO_STAGE]) <= 2:
            for index, names in enumerate(file[constants.PARAM_SLICE_MAPPINGS]):
                for name, address in names.items():
                    yield index, name, address.start, address.numel
            return
        for index, shapes in enumerate(self._shapes):
            at = 0
            for name, shape in shapes.items():
                share = -(-shape.numel() // len(self._files))
                yield index, name, at, max(0, min(share, shape.numel() - rank * share))
                at += share

    def _found(self, name: str) -> list[tuple[int, int, Slice]]:
        if name not in self._where:
            raise CheckpointError(f"{self._folder} has no state of {name}. Load it into the model it was saved from.")
        return self._where[name]

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        pieces = []
        for rank, index, piece in self._found(name):
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                base, masters = sections(self._files[rank])
                flat = masters[index] if key == MASTER else _readable(base["state"], index)[key]
                pieces.append(flat.view(-1).narrow(0, piece.at + first - piece.start, last - first))
        if sum(piece.numel() for piece in pieces) != numel:
            raise CheckpointError(
                f"{self._folder} lacks a part of {name}, as a node's own folder does "
                "(checkpoint.use_node_local_storage). Load it on the nodes and ranks that saved it."
            )
        return torch.cat(pieces) if pieces else torch.empty(0)

    def step(self, name: str) -> int:
        rank, index, _ = self._found(name)[0]
        return int(sections(self._files[rank])[0]["state"].get(index, {}).get("step", 0))

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        rank, index, _ = self._found(name)[0]
        groups = sections(self._files[rank])[0]["param_groups"]
        return next(group for group in groups if index in group["params"])

    @property
    def of_the_run(self) -> Mapping[str, Any]:
        found = self._files[0]
        return found if self._keeps_loss_scale else {key: found[key] for key in found if key not in _LOSS_SCALE}


class UniversalFolder:
    """What `ds_to_universal` makes of a checkpoint: a folder for each parameter."""

    def __init__(self, tag: TagFiles) -> None:
        self._tag = tag
        if not tag.has("zero/optimizer_state.pt"):
            raise CheckpointError(
                f"{tag.folder} has no zero/optimizer_state.pt: it is no universal checkpoint. Make one with "
                "ds-agsel universal, or set checkpoint.load_universal=false."
            )
        self._common = tag.load("zero/optimizer_state.pt")
        self._index = {
            name: index for index, shapes in enumerate(model_states(tag)[constants.PARAM_SHAPES]) for name in shapes
        }

    @property
    def names(self) -> Collection[str]:
        return [name for name in self._index if self._tag.has(f"zero/{name}/{MASTER}.pt")]

    @property
    def _base(self) -> Mapping[str, Any]:
        return self._common.get(constants.OPTIMIZER_STATE_DICT, self._common)  # stage 3 has a whole state_dict there

    def _file(self, name: str, key: str) -> Any:
        return self._tag.load(f"zero/{name}/{key}.pt")

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        found = self._file(name, key)
        full = found[constants.PARAM] if isinstance(found, Mapping) else found
        return full.reshape(-1).narrow(0, start, numel)

    def step(self, name: str) -> int:
        if self._tag.has(f"zero/{name}/step.pt"):
            return int(self._file(name, "step"))
        return int(self._base["state"][self._index[name]]["step"])

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        index = self._index[name]
        return next(group for group in self._base[constants.PARAM_GROUPS] if index in group["params"])

    @property
    def of_the_run(self) -> Mapping[str, Any]:
        return self._common


def model_states(tag: TagFiles) -> Mapping[str, Any]:
    """Return the first rank's `*_model_states.pt` of any stage, its tensors left on disk until they are read."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if tag.has(name):
            return tag.load(name)
    raise CheckpointError(f"{tag.folder} has no *_model_states.pt. Load another checkpoint.")
