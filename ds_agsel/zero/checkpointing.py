"""Saving and loading through the engine: whole tags (`ds_agsel.checkpoints`), decided alike on all ranks.

[Note: Who hashes] Each rank hashes what it wrote, from its own node's cache and beside the others; the manifest is
written by one rank of each folder, once it sees every file. With a folder that all nodes share that is rank 0. With
`checkpoint.use_node_local_storage` each node has a folder of its own with a manifest of its own, and a tag is whole
where it is whole on every node. At a load the ranks of a folder share the hashing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

import ds_agsel
from ds_agsel import checkpoints
from ds_agsel.errors import CheckpointError
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.repartition import SavedStates, UniversalFolder, ZeroFiles, load_lazily, model_states

SELECTION_KEY = "adagrad_select"  # in the client_state, beside which a universal checkpoint keeps nothing of ours
FIRST_MODEL_STATES = "*mp_rank_00_model_states.pt"

logger = logging.getLogger("ds_agsel")


class CheckpointingEngine(compat.DeepSpeedEngine, compat.ChecksOverrides):
    """The part of `SelectiveEngine` that saves and loads."""

    selection: Selection

    @compat.overrides
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        keep: int | None = None,
    ) -> bool:
        """`DeepSpeedEngine.save_checkpoint`, with the selection and a manifest in the tag's folder; ``latest`` last.

        ``keep``: once the new tag is verified, remove all but the ``keep`` newest whole ones. Collective. Raises
        CheckpointError on every rank where any could not write: what this call wrote is then removed, what it was to
        replace is put back, and ``latest`` names the tag before.
        """
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        directory, folder = Path(save_dir), checkpoints.folder_of(save_dir, tag)
        place = _Place.of(self)
        errors = _Errors()
        if place.leads:
            errors.attempt(checkpoints.make_room, folder)
        failure = errors.first_of_all_ranks()
        if failure is None:
            state = self.selection.state_dict()
            ours_and_theirs = {**universal_info(), **(client_state or {}), SELECTION_KEY: state}
            with self.selection.thawed(), compat.writes_through(self, errors.attempt) as written:
                super().save_checkpoint(os.fspath(save_dir), tag, ours_and_theirs, False, exclude_frozen_parameters)
            if place.leads:
                errors.attempt((folder / checkpoints.STATE_FILE).write_text, json.dumps(state), encoding="utf-8")
                written.append(folder / checkpoints.STATE_FILE)
            ours = errors.attempt(checkpoints.entries, folder, written)
            failure = errors.first_of_all_ranks()
            if failure is None:
                of_all = _gather((place.leader, ours))
                if place.leads:
                    files: dict[str, Any] = {}
                    for leader, entries in of_all:
                        files.update(entries if leader == place.leader else {})
                    errors.attempt(checkpoints.write_manifest, folder, files, self._facts())
                failure = errors.first_of_all_ranks()
        if failure is not None:
            if place.leads:
                checkpoints.give_up(folder)
            dist.barrier()
            raise CheckpointError(
                f"checkpoint {folder} could not be written: {failure}. '{checkpoints.LATEST_FILE}' still names the "
                "checkpoint before it. Make room, or save to another folder."
            )
        if place.leads:
            if save_latest:
                errors.attempt(checkpoints.write_latest, directory, tag)
            errors.attempt(checkpoints.settle, folder)
        if keep is not None and not self._problems(folder, place) and place.leads:
            errors.attempt(checkpoints.prune, directory, keep)
        failure = errors.first_of_all_ranks()
        if failure is not None:
            raise CheckpointError(
                f"checkpoint {folder} is whole, but what follows a save was not done: {failure}. "
                f"Load it with tag={tag!r}; make room."
            )
        return True

    def _facts(self) -> dict[str, Any]:
        section = json.dumps(self.selection.config.model_dump(mode="json"), sort_keys=True)
        return {
            "world_size": dist.get_world_size(),
            "stage": int(self.zero_optimization_stage()),
            "steps": self.global_steps,
            "layout_sha256": self._layout(),
            "section_sha256": _sha256(section),
            "versions": {
                "ds_agsel": ds_agsel.__version__,
                "deepspeed": compat.deepspeed_version(),
                "torch": str(torch.__version__),
            },
        }

    def _layout(self) -> str:
        """Which elements lie where in which rank's partitions, hashed; equal on all ranks."""
        shapes = [[(name, list(shape)) for name, shape in group.items()] for group in self._get_zero_param_shapes()]
        return _sha256(json.dumps([dist.get_world_size(), self._form(), shapes]))

    def _form(self) -> str:
        return "3" if self.zero_optimization_partition_weights() else "1 and 2"

    @compat.overrides
    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], tag: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """`DeepSpeedEngine.load_checkpoint` of a verified tag, with the selection: counts, history and plan go on.

        Without ``tag``: the one that ``latest`` names or, where that is not whole, the newest that is; a warning then
        says why. With ``load_module_only=True`` or ``load_optimizer_states=False`` the selection starts afresh.
        Collective. Raises CheckpointError on every rank, before anything is loaded, for a named tag that is damaged,
        where none is whole, and for a checkpoint of other blocks or one that plain DeepSpeed wrote.
        """
        directory = Path(load_dir)
        names = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
        options = {**dict(zip(names, args)), **kwargs}
        with_states = options.get("load_optimizer_states", True) and not options.get("load_module_only", False)
        tag = self._whole_tag(directory, None if tag is None else str(tag))
        if tag is None:
            logger.warning("adagrad_select: %s holds no checkpoint; nothing was loaded.", directory)
            return None, None
        state = None
        if with_states:
            state = read_selection_state(directory / tag, self.load_universal_checkpoint())
            self._check_form(directory / tag)
            self.selection.check_compatible(state, f"checkpoint {directory / tag}")
        with self.selection.thawed():
            result = super().load_checkpoint(os.fspath(load_dir), tag, *args, **kwargs)
        if state is not None and result[0] is not None:
            self.selection.load_state_dict(state)
        path, client_state = result
        ours = (SELECTION_KEY, *universal_info())
        return path, client_state and {key: value for key, value in client_state.items() if key not in ours}

    def _check_form(self, folder: Path) -> None:
        if self.load_universal_checkpoint():
            UniversalFolder(folder)
            return
        if not checkpoints.has_manifest(folder):
            return
        stage = checkpoints.read_manifest(folder).facts.get("stage", 2)
        if (stage == 3) != self.zero_optimization_partition_weights():
            raise CheckpointError(
                f"checkpoint {folder} was saved with zero_optimization.stage={stage}; a run with stage="
                f"{int(self.zero_optimization_stage())} can't load it as it is. Make a universal checkpoint of it "
                "(python -m deepspeed.checkpoint.ds_to_universal) and set checkpoint.load_universal=true, or use the "
                "same stage."
            )

    @compat.overrides
    def _load_zero_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
        """Stock where this rank's file is what it needs; otherwise [Note: By name] in `repartition`."""
        folder = Path(load_dir) / tag
        saved: SavedStates
        if self.load_universal_checkpoint():
            saved = UniversalFolder(folder)
            if not self.zero_optimization_partition_weights():
                self._load_what_zero_does_not_manage(folder)
        elif self._is_ours_to_cut(folder):
            saved = ZeroFiles(folder)
        else:
            return super()._load_zero_checkpoint(load_dir, tag, load_optimizer_states)
        self.optimizer.load_by_name(
            saved,
            load_optimizer_states=load_optimizer_states,
            load_from_fp32_weights=True,
            param_shapes=self._get_zero_param_shapes(),
        )
        return True

    @compat.overrides
    def _get_all_zero_checkpoint_state_dicts(self, zero_ckpt_names: list[str]) -> list[Any]:
        """Stock; where states live on disk, they are read as they are stored there, and not all at once before."""
        with compat.loads_through(self, load_lazily) if self.optimizer.states_are_on_disk else nullcontext():
            return super()._get_all_zero_checkpoint_state_dicts(zero_ckpt_names)

    def _is_ours_to_cut(self, folder: Path) -> bool:
        facts = checkpoints.read_manifest(folder).facts if checkpoints.has_manifest(folder) else {}
        here = self._layout()
        return self.loaded_checkpoint_dp_world_size != dist.get_world_size() or facts.get("layout_sha256", here) != here

    def _load_what_zero_does_not_manage(self, folder: Path) -> None:
        """Buffers and frozen parameters, which DeepSpeed's universal load leaves as they are (engine.py:4660)."""
        own = self.module.state_dict()
        module = model_states(folder)["module"]
        fitting = {name: value for name, value in module.items() if name in own and own[name].shape == value.shape}
        self.module.load_state_dict(fitting, strict=False)

    @compat.overrides
    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]:
        """Stock, or the first rank's file where the saving run had fewer ranks or another stage."""
        found = super()._get_all_ckpt_names(checkpoints_path, tag)
        return found or [os.fspath(path) for path in sorted(Path(checkpoints_path, tag).glob(FIRST_MODEL_STATES))[:1]]

    def _whole_tag(self, directory: Path, wanted: str | None) -> str | None:
        """The tag to load, the same on all ranks; None where there is none and none is wanted. Collective."""
        place = _Place.of(self)
        passed_over: dict[str, list[str]] = {}
        latest = checkpoints.LATEST_UNIVERSAL_FILE if self.load_universal_checkpoint() else checkpoints.LATEST_FILE
        for tag, is_verifiable in _of_rank_0(lambda: _candidates(directory, wanted, latest)):
            if not is_verifiable:
                self._warn(f"{directory / tag} has no {checkpoints.MANIFEST_FILE}, so it can't be verified.")
                return tag
            wrong = self._problems(directory / tag, place)
            if not wrong:
                if passed_over:
                    self._warn(f"LOADING {directory / tag}, NOT A NEWER ONE. Passed over: {_reasons(passed_over)}.")
                return tag
            passed_over[tag] = wrong
        if not passed_over:
            return None
        remedy = "Save anew, or start afresh." if wanted is None else "Without tag= the newest whole one is loaded."
        raise CheckpointError(f"{directory}: no whole checkpoint to load: {_reasons(passed_over)}. {remedy}")

    def _problems(self, folder: Path, place: _Place) -> list[str]:
        """What is wrong with ``folder``, on any node. Collective."""
        of_all = _gather(checkpoints.problems(folder, place.index, place.count))
        return list(dict.fromkeys(problem for found in of_all for problem in found))

    def _warn(self, message: str) -> None:
        if self.global_rank == 0:
            logger.warning("adagrad_select: %s", message)


def _candidates(directory: Path, wanted: str | None, latest: str) -> list[tuple[str, bool]]:
    """The tags to try, in turn, and whether each can be verified."""
    tags = [checkpoints.folder_of(directory, wanted).name] if wanted else checkpoints.candidates(directory, latest)
    return [(tag, checkpoints.is_verifiable(directory / tag) or not (directory / tag).is_dir()) for tag in tags]


def _reasons(passed_over: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{tag} ({checkpoints.in_words(why)})" for tag, why in passed_over.items())


def read_selection_state(folder: Path, universal: bool = False) -> dict[str, Any]:
    """The selection saved in a checkpoint folder. Raises CheckpointError where there is none, or a damaged one."""
    path = folder / checkpoints.STATE_FILE
    try:
        if universal:  # which has what DeepSpeed's converter copies alone
            return model_states(folder)[SELECTION_KEY]
        if (folder / "zero" / "optimizer_state.pt").is_file():
            raise CheckpointError(
                f"{folder} is a universal checkpoint. Set checkpoint.load_universal=true in the ds_config to load it."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, KeyError):
        raise CheckpointError(
            f"{folder} has no {checkpoints.STATE_FILE}: plain DeepSpeed wrote it. Its weights alone can be "
            "loaded, and selection then starts afresh: load_checkpoint(..., load_module_only=True)."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}). Load an earlier checkpoint with tag=.") from error


def universal_info() -> dict[str, Any]:
    """The client_state without which `ds_to_universal` refuses a checkpoint (0.19.8)."""
    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Place:
    """This rank among the ``count`` that see the same checkpoint folder: the ``index``-th, after rank ``leader``."""

    leader: int
    index: int
    count: int

    @property
    def leads(self) -> bool:
        return self.index == 0

    @classmethod
    def of(cls, engine: compat.DeepSpeedEngine) -> _Place:
        """Collective."""
        if not engine.use_node_local_storage():
            return cls(0, engine.global_rank, dist.get_world_size())
        leader = engine.global_rank - int(engine.local_rank)
        return cls(leader, int(engine.local_rank), _gather(leader).count(leader))


def _gather(item: Any) -> list[Any]:
    """Every rank's ``item``, by rank. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found


def _of_rank_0(look: Callable[[], Any]) -> Any:
    """What ``look()`` gives or raises on rank 0, the only one to call it. Collective."""
    answer: Any = None
    if dist.get_rank() == 0:
        try:
            answer = look()
        except (CheckpointError, OSError) as error:
            answer = CheckpointError(str(error))
    answer = _gather(answer)[0]
    if isinstance(answer, CheckpointError):
        raise answer
    return answer


class _Errors:
    """The errors that this rank met. They are kept, not raised: one rank alone that raised would leave the others at a
    barrier."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def attempt(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``work(...)``, or None where it fails or an earlier attempt has failed."""
        if self._errors:
            return None
        try:
            return work(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk; ours is one too
            self._errors.append(error)
            return None

    def first_of_all_ranks(self) -> str | None:
        """What went wrong, on this rank or on another; None where all went well. Collective."""
        failed = torch.tensor([bool(self._errors)], dtype=torch.int32, device=get_accelerator().current_device_name())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed.item():
            return None
        return f"{self._errors[0]}" if self._errors else "another rank could not write"
