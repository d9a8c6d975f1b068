"""Save and load through the engine: whole tags (`ds_agsel.checkpoints`), with the same outcome on all ranks.

[Note: Who hashes] Each rank hashes what it wrote, from its own node's cache and beside the others; the manifest is
written by one rank of each folder, once it sees every file. With a folder that all nodes share that is rank 0. With
`checkpoint.use_node_local_storage` each node has its own folder with its own manifest, and a tag is whole if it is
whole on every node. At a load the ranks of a folder share the hashing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import (
    PARAM_SHAPES,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

import ds_agsel
from ds_agsel import checkpoints, metadata
from ds_agsel.errors import CheckpointError
from ds_agsel.files import write_atomically
from ds_agsel.selection import Selection
from ds_agsel.tag_owner import Run
from ds_agsel.zero import compat, frozen_fragments
from ds_agsel.zero.carriers import sparse_state
from ds_agsel.zero.collective import Errors, Place, gather, of_rank_0
from ds_agsel.zero.repartition import SavedStates, UniversalFolder, ZeroFiles, model_states
from ds_agsel.zero.tag_files import TagFiles, restricted_unpickling

SELECTION_KEY = "adagrad_select"  # in rank 0's client_state, all of ours that DeepSpeed's universal converter keeps
_LOAD_OPTIONS = (
    "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only", "custom_load_fn",
)  # fmt: skip
FIRST_MODEL_STATES = "*mp_rank_00_model_states.pt"

logger = logging.getLogger("ds_agsel")


class CheckpointingEngine(compat.DeepSpeedEngine, compat.ChecksOverrides):
    """The part of `SelectiveEngine` that saves and loads."""

    selection: Selection
    _saving: Errors  # of the save that is under way
    _saved_states: SavedStates | None = None  # of the load that is under way, where states are cut by name

    @cached_property
    def _run(self) -> Run:
        return Run()

    @compat.overrides
    def destroy(self) -> None:
        """`DeepSpeedEngine.destroy`; another run may then clear up after this one."""
        self._run.release()
        super().destroy()

    # ------------------------------------------------------------------ saving

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

        ``keep``: read the new tag back, then remove all but the ``keep`` newest whole ones of this run and of the runs
        it goes on from; other runs' tags stay. Where the environment variable DS_AGSEL_CHECKPOINT_KEY is set, the
        manifest is signed by that key. Collective. Raises CheckpointError on every rank where any could not write, for
        a state that can't be saved and, with ``keep``, for a tag that reads back wrong: what this call wrote is then
        removed, the tag it was to replace is restored, and ``latest`` names the previous tag.
        """
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        directory, folder = Path(save_dir), checkpoints.folder_of(save_dir, tag)
        place = Place.of(self)
        self._saving = errors = Errors()
        # Also the barrier: a slower rank may still read the tag whose folder `make_room` renames.
        state = errors.attempt(self._state_texts)
        failure = errors.first_of_all_ranks()
        if failure is None:
            if place.leads:
                errors.attempt(checkpoints.make_room, folder, self._run)
            failure = errors.first_of_all_ranks() or self._write(
                folder, place, client_state, state, exclude_frozen_parameters
            )
            if failure is None and keep is not None:
                wrong = self._problems(folder, place)
                failure = f"it reads back wrong: {checkpoints.in_words(wrong)}" if wrong else None
            if failure is not None and place.leads:
                with suppress(OSError):
                    checkpoints.give_up(folder)
        if failure is not None:
            dist.barrier()
            raise CheckpointError(
                f"checkpoint {folder} could not be written: {failure}. '{checkpoints.LATEST_FILE}' still names the "
                "checkpoint before it. Make room, or save to another folder, where that is the reason."
            )
        if place.leads:
            if save_latest:
                errors.attempt(checkpoints.write_latest, directory, tag)
            errors.attempt(checkpoints.settle, folder)
            if keep is not None:
                errors.attempt(checkpoints.prune, directory, keep, self._run)
        failure = errors.first_of_all_ranks()
        if failure is not None:
            raise CheckpointError(
                f"checkpoint {folder} is whole, but what follows a save was not done: {failure}. "
                f"Load it with tag={tag!r}; make room."
            )
        return True

    def _state_texts(self) -> tuple[str, str]:
        """Return the selection's state as JSON: whole for our own file; without its history for the client_state."""
        state = self.selection.state_dict()
        try:
            whole = json.dumps(state, allow_nan=False)
            return whole, json.dumps({**state, "history": []}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"the selection's state is not JSON ({error}). policy={self.selection.config.policy!r}: its "
                "state_dict() may hold dicts with text keys, lists, text, finite numbers, booleans and None; convert "
                "numpy values with .tolist()"
            ) from None

    def _write(
        self,
        folder: Path,
        place: Place,
        client_state: Mapping[str, Any] | None,
        state: tuple[str, str],
        exclude_frozen_parameters: bool,
    ) -> str | None:
        """Write all files, then the manifest; return the first error of any rank. Collective."""
        errors = self._saving
        all_of_it = {**universal_info(), **(client_state or {})}
        carriers = self.optimizer.carriers
        sparse = None if carriers is None else carriers.state_dict(whole=place.leads)  # collective: not an `attempt`
        if dist.get_rank() == 0:
            all_of_it[SELECTION_KEY] = json.loads(state[1])
        self.optimizer.window.lift()  # DeepSpeed records frozen parameters as frozen by the user (engine.py:5433)
        with compat.writes_through(self, errors.attempt) as written:
            super().save_checkpoint(os.fspath(folder.parent), folder.name, all_of_it, False, exclude_frozen_parameters)
        if carriers is not None:
            written += errors.attempt(carriers.save, folder, sparse if place.leads else None) or []
        if place.leads:
            errors.attempt(write_atomically, folder / checkpoints.STATE_FILE, state[0])
            written.append(folder / checkpoints.STATE_FILE)
        ours = errors.attempt(checkpoints.entries, folder, written)
        failure = errors.first_of_all_ranks()
        if failure is not None:
            return failure
        of_all = gather((place.leader, ours))
        facts = self._facts()
        if place.leads:
            files: dict[str, Any] = {}
            for leader, entries in of_all:
                files.update(entries if leader == place.leader else {})
            errors.attempt(checkpoints.write_manifest, folder, files, {**facts, **self._run.facts()})
        return errors.first_of_all_ranks()

    # An error of these two on one rank must not keep it from the barrier that ends a save (engine.py:4964).

    @compat.overrides
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saving.attempt(super()._save_checkpoint, *args, **kwargs)

    @compat.overrides
    def _save_zero_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saving.attempt(super()._save_zero_checkpoint, *args, **kwargs)

    def _facts(self) -> dict[str, Any]:
        section = json.dumps(self.selection.config.model_dump(mode="json"), sort_keys=True)
        return {
            "world_size": dist.get_world_size(),
            "stage": int(self.zero_optimization_stage()),
            "dtype": self._dtype(),
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
        """Return a hash of which elements lie where in which rank's partitions; equal on all ranks."""
        shapes = [[(name, list(shape)) for name, shape in group.items()] for group in self._get_zero_param_shapes()]
        return _sha256(json.dumps([dist.get_world_size(), self._form(), shapes]))

    def _form(self) -> str:
        return "3" if self.zero_optimization_partition_weights() else "1 and 2"

    def _dtype(self) -> str:
        return "bf16" if self.bfloat16_enabled() else "fp16" if self.fp16_enabled() else "fp32"

    # ----------------------------------------------------------------- loading

    @compat.overrides
    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], tag: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """`DeepSpeedEngine.load_checkpoint` of a verified tag, with the selection: counts, history and plan go on.

        Without ``tag``: the one that ``latest`` names or, if that is not whole, the newest whole tag; a warning then
        says why. With ``load_module_only=True`` or ``load_optimizer_states=False`` the selection starts afresh.

        Files run no code: they are read with ``weights_only=True`` and the classes that DeepSpeed stores. A
        client_state with other classes needs `torch.serialization.add_safe_globals`, or the environment variable
        DS_AGSEL_TRUST_CHECKPOINTS=1, which lets the file's author run code here. Where
        DS_AGSEL_CHECKPOINT_KEY is set, only checkpoints that were signed by that key load.

        Collective. Raises CheckpointError on every rank, before anything is loaded, for a named tag that is damaged,
        where none is whole, for a file that would run code, and for a checkpoint of other blocks, shapes or stages or
        one that plain DeepSpeed wrote.
        """
        directory = Path(load_dir)
        options: dict[str, Any] = {**dict(zip(_LOAD_OPTIONS, args)), **kwargs}
        with_states = options.get("load_optimizer_states", True) and not options.get("load_module_only", False)
        if self.zero_optimization_partition_weights() and not with_states:
            options["load_optimizer_states"] = False  # else DeepSpeed 0.19.8 loads no weights either (engine.py:4612)
        tag = self._whole_tag(directory, None if tag is None else str(tag))
        if tag is None:
            logger.warning("adagrad_select: %s holds no checkpoint; nothing was loaded.", directory)
            return None, None
        errors = Errors()
        prepared = errors.attempt(self._prepare, directory / tag, with_states)
        failure = errors.first_of_all_ranks()
        if failure is not None:
            raise CheckpointError(f"{failure}.")
        files, state, self._saved_states = prepared
        carriers = self.optimizer.carriers
        sparse = None if carriers is None or not with_states else sparse_state(files)
        try:
            load = partial(files.load, lazily=self.optimizer.states_are_on_disk)
            reads = frozen_fragments.reader(
                files, load, self.module, dist.get_rank(group=self.optimizer.dp_process_group)
            )
            self.optimizer.window.lift()
            with restricted_unpickling(), compat.loads_through(self, reads), compat.fp32_weights_of(tag):
                result = super().load_checkpoint(os.fspath(load_dir), tag, **options)
        finally:
            self._saved_states = None
        if state is not None and result[0] is not None:
            self.selection.load_state_dict(state)
            self._run.go_on_from({} if files.manifest is None else files.manifest.facts)
        if carriers is not None and result[0] is not None:
            carriers.restart() if sparse is None else carriers.load(sparse, files)
        path, client_state = result
        ours = (SELECTION_KEY, *universal_info())
        return path, client_state and {key: value for key, value in client_state.items() if key not in ours}

    def _prepare(
        self, folder: Path, with_states: bool
    ) -> tuple[TagFiles, metadata.SelectionState | None, SavedStates | None]:
        """Open what this rank will read of ``folder``. Raises CheckpointError for anything that does not fit."""
        files = TagFiles(folder)
        for name in self._get_all_ckpt_names(os.fspath(folder.parent), folder.name):
            files.load(name)
        if not with_states:
            return files, None, UniversalFolder(files) if self.load_universal_checkpoint() else None
        state = read_selection_state(files, self.load_universal_checkpoint())
        self._check_form(files)
        self.selection.check_compatible(state, f"checkpoint {folder}")
        self._check_shapes(files)
        if self.optimizer.carriers is not None:
            self.optimizer.carriers.check_compatible(sparse_state(files), f"checkpoint {folder}")
        saved = self._states_to_cut(files)
        if saved is None:
            files.load(self._get_zero_ckpt_name(os.fspath(folder.parent), folder.name))
            return files, state, None
        needed = {name for layout in self.optimizer.layouts() for name in layout.names}
        missing = sorted(needed - set(saved.names))
        if missing:
            raise CheckpointError(
                f"checkpoint {folder} has no states of {checkpoints.in_words(missing)}. Load it into the model it was "
                "saved from, or load the weights alone: load_module_only=True."
            )
        return files, state, saved

    def _check_form(self, files: TagFiles) -> None:
        if self.load_universal_checkpoint() or files.manifest is None:
            return
        stage = files.manifest.facts.get("stage", 2)
        if (stage == 3) != self.zero_optimization_partition_weights():
            raise CheckpointError(
                f"checkpoint {files.folder} was saved with zero_optimization.stage={stage}; a run with stage="
                f"{int(self.zero_optimization_stage())} can't load it as it is. Make a universal checkpoint of it "
                "(ds-agsel universal) and set checkpoint.load_universal=true, or use the "
                "same stage."
            )

    def _check_shapes(self, files: TagFiles) -> None:
        saved = {name: tuple(shape) for group in model_states(files)[PARAM_SHAPES] for name, shape in group.items()}
        here = {name: tuple(shape) for group in self._get_zero_param_shapes() for name, shape in group.items()}
        for name in sorted(saved.keys() & here.keys()):
            if saved[name] != here[name]:
                raise CheckpointError(
                    f"checkpoint {files.folder} has {name} of shape {saved[name]}, and this model's is {here[name]}. "
                    "Load it into the model it was saved from."
                )

    def _states_to_cut(self, files: TagFiles) -> SavedStates | None:
        """Return the states to cut this rank's from if its own file does not fit; [Note: By name] in `repartition`."""
        if self.load_universal_checkpoint():
            return UniversalFolder(files)
        facts = {} if files.manifest is None else files.manifest.facts
        here = self._layout()
        same_dtype = (facts.get("dtype") or _dtype_by_names(files)) in (None, self._dtype())
        same_layout = facts.get("layout_sha256", here) == here
        if same_dtype and same_layout and model_states(files)["dp_world_size"] == dist.get_world_size():
            return None
        return ZeroFiles(files, keeps_loss_scale=same_dtype)

    @compat.overrides
    def _load_zero_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
        """Load as stock code does if this rank's file fits; otherwise by [Note: By name] in `repartition`."""
        if self.load_universal_checkpoint() and not self.zero_optimization_partition_weights():
            self._load_what_zero_does_not_manage(TagFiles(Path(load_dir) / tag))
        if self._saved_states is None:
            return super()._load_zero_checkpoint(load_dir, tag, load_optimizer_states)
        self.optimizer.load_by_name(
            self._saved_states,
            load_optimizer_states=load_optimizer_states,
            load_from_fp32_weights=True,
            param_shapes=self._get_zero_param_shapes(),
        )
        return True

    def _load_what_zero_does_not_manage(self, files: TagFiles) -> None:
        """Load buffers and frozen parameters, which DeepSpeed's universal load leaves as they are (engine.py:4660)."""
        own = self.module.state_dict()
        module = model_states(files)["module"]
        fitting = {name: value for name, value in module.items() if name in own and own[name].shape == value.shape}
        self.module.load_state_dict(fitting, strict=False)

    @compat.overrides
    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]:
        """Return stock's names, or the first rank's file if the saving run had fewer ranks or another stage."""
        found: list[str] = super()._get_all_ckpt_names(checkpoints_path, tag)
        return found or [os.fspath(path) for path in sorted(Path(checkpoints_path, tag).glob(FIRST_MODEL_STATES))[:1]]

    def _whole_tag(self, directory: Path, wanted: str | None) -> str | None:
        """Return the tag to load, equal on all ranks; None if there is none and none is named. Collective."""
        place = Place.of(self)
        passed_over: dict[str, list[str]] = {}
        latest = checkpoints.LATEST_UNIVERSAL_FILE if self.load_universal_checkpoint() else checkpoints.LATEST_FILE
        for tag, is_verifiable in of_rank_0(lambda: _candidates(directory, wanted, latest)):
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

    def _problems(self, folder: Path, place: Place) -> list[str]:
        """Return the problems of ``folder`` on any node. Collective."""
        of_all = gather(checkpoints.problems(folder, place.index, place.count))
        return list(dict.fromkeys(problem for found in of_all for problem in found))

    def _warn(self, message: str) -> None:
        if self.global_rank == 0:
            logger.warning("adagrad_select: %s", message)


def _candidates(directory: Path, wanted: str | None, latest: str) -> list[tuple[str, bool]]:
    """Return the tags to try, in turn, each with whether it can be verified."""
    tags = [checkpoints.folder_of(directory, wanted).name] if wanted else checkpoints.candidates(directory, latest)
    return [(tag, checkpoints.is_verifiable(directory / tag) or not (directory / tag).is_dir()) for tag in tags]


def _reasons(passed_over: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{tag} ({checkpoints.in_words(why)})" for tag, why in passed_over.items())


def read_selection_state(files: TagFiles, universal: bool = False) -> metadata.SelectionState:
    """Return the selection saved in a tag. Raises CheckpointError if it is missing or wrong."""
    folder = files.folder
    try:
        if universal:  # this file has only what DeepSpeed's converter copies
            return metadata.read_selection_state(model_states(files)[SELECTION_KEY], f"checkpoint {folder}")
        if files.has("zero/optimizer_state.pt"):
            raise CheckpointError(
                f"{folder} is a universal checkpoint. Set checkpoint.load_universal=true in the ds_config to load it."
            )
        return checkpoints.read_state(folder)
    except (FileNotFoundError, KeyError):
        raise CheckpointError(
            f"{folder} has no {checkpoints.STATE_FILE}: plain DeepSpeed wrote it. Its weights alone can be "
            "loaded, and selection then starts afresh: load_checkpoint(..., load_module_only=True)."
        ) from None


def _dtype_by_names(files: TagFiles) -> str | None:
    """Return the dtype that an older ds_agsel saved, by its files' names; None if these don't tell (fp16 or fp32)."""
    return "bf16" if files.names("bf16_zero_pp_rank_*_optim_states.pt") else None


def universal_info() -> dict[str, Any]:
    """Return the client_state without which `ds_to_universal` refuses a checkpoint (0.19.8)."""
    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
