"""Moments that rest in fewer bits where AdamW runs, and are fp32 while their group is updated.

[Note: Unpacked] A group's moments are unpacked to one scratch buffer, as large as the largest group's, before
DeepSpeed's optimizer reads them, and packed from it when they have been updated. Between steps the optimizer's state
has expanded one-element zeros in their place: right shape, no storage. Read and write moments only inside `readable`
or `writable`.

[Note: Rounding] Where a form rounds stochastically, its random bits depend on (seed, step, group, moment) alone, so
that a resumed run draws the same. What is loaded or set between steps is rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_agsel.residency.states import MOMENTS
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.repartition import sections
from ds_agsel.zero.states.forms import MomentForm
from ds_agsel.zero.states.home import StateBytes
from ds_agsel.zero.states.in_place import StatesInPlace
from ds_agsel.zero.storage import storage_bytes


class PackedStates(StatesInPlace):
    """As `StatesInPlace`, with moments that rest in ``form``."""

    are_temporary = True

    def __init__(
        self,
        optimizer: compat.ZeROOptimizer,
        block_of_group: Sequence[int],
        selection: Selection,
        form: MomentForm,
    ) -> None:
        super().__init__(optimizer, block_of_group)
        self._selection = selection
        self._form = form
        self._packed: MutableMapping[int, dict[str, Tensor]] = {}  # by group, from its first update on
        self._loaded: dict[int, dict[str, Tensor]] = {}  # by group: what a load brings in this form
        self._scratch: Tensor | None = None
        self._zero = torch.zeros(1, device=self._masters[0].device)  # [Note: Unpacked]

    # ------------------------------------------------------------------------- a step

    def enter(self, shown: int, group: int) -> None:
        """Unpack the moments of ``group`` to the scratch buffer; those of its first update are zeros."""
        state = self.optimizer.optimizer.state
        master = self._masters[group]
        if not state.get(master):
            state[master] = {"step": self._zero_steps(shown, master)}
        state[master].update(self._unpacked(self._at_hand(group), self._rows(master)))

    def leave(self, shown: int, group: int) -> None:
        """Pack the moments of ``group``, rounded as [Note: Rounding] says."""
        state = self.optimizer.optimizer.state[self._masters[group]]
        packed: dict[str, Tensor] = {}
        for number, key in enumerate(MOMENTS):
            generator = self._generator(group, number, state[key].device) if self._form.is_random else None
            packed |= self._form.pack(key, state[key], generator)
        self._keep(group, packed)
        self._hide(group)

    def _at_hand(self, group: int) -> Mapping[str, Tensor] | None:
        """Return the packed moments of ``group`` where its update runs; None before the first."""
        return self._packed.get(group)

    def _keep(self, group: int, packed: dict[str, Tensor]) -> None:
        """Keep the ``packed`` moments of an update of ``group``."""
        self._packed[group] = packed

    def _zero_steps(self, shown: int, master: Tensor) -> int | Tensor:
        param_group = compat.param_group_of(self.optimizer, shown)
        return compat.adam_step(self.optimizer.optimizer, 0, param_group, master.device)

    def _rows(self, master: Tensor) -> Tensor:
        """Return room for the two moments of ``master``, (2, numel), in the scratch buffer."""
        if self._scratch is None:
            numel = max(each.numel() for each in self._masters)
            self._scratch = torch.empty(len(MOMENTS) * numel, dtype=torch.float32, device=master.device)
        return self._scratch[: len(MOMENTS) * master.numel()].view(len(MOMENTS), master.numel())

    def _unpacked(self, packed: Mapping[str, Tensor] | None, rows: Tensor) -> dict[str, Tensor]:
        """Return moments by name, ``packed`` written to ``rows``; zeros where there are none."""
        for key, row in zip(MOMENTS, rows, strict=True):
            if packed is None:
                row.zero_()
            else:
                self._form.unpack(key, packed, row)
        return dict(zip(MOMENTS, rows, strict=True))

    def _generator(self, group: int, number: int, device: torch.device) -> torch.Generator:
        seed = self._selection.config.seed
        for part in (self._selection.num_steps, group, number):
            seed = (seed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
        return torch.Generator(device).manual_seed(seed)

    def _hide(self, group: int) -> None:
        """Put zeros without storage in the place of the moments; see [Note: Unpacked]."""
        master = self._masters[group]
        self.optimizer.optimizer.state[master].update(dict.fromkeys(MOMENTS, self._zero.expand(master.numel())))

    def _is_hidden(self, moment: Tensor) -> bool:
        return moment.untyped_storage().data_ptr() == self._zero.untyped_storage().data_ptr()

    def _drop_moments(self, group: int) -> None:
        super()._drop_moments(group)
        self._packed.pop(group, None)

    # ------------------------------------------------------------------- between steps

    @contextmanager
    def readable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        groups = [group for group in self._all_or(groups) if group in self._packed]
        for group in groups:
            self._show_moments(group)
        try:
            yield
        finally:
            for group in groups:
                self._hide(group)

    def _show_moments(self, group: int) -> None:
        """Put the moments of ``group``, which has some, in DeepSpeed's place for them, in new memory."""
        packed, master = self._packed[group], self._masters[group]
        room = self.fp32_room(len(MOMENTS) * master.numel(), next(iter(packed.values())).device)
        self.optimizer.optimizer.state[master].update(self._unpacked(packed, room.view(len(MOMENTS), -1)))

    @contextmanager
    def writable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        """As the base's. Of all groups (None): for a load, which replaces moments as a whole; they stay packed."""
        for group in () if groups is None else groups:
            if group in self._packed:
                self._show_moments(group)
        try:
            yield
        finally:
            self.adopt(groups)

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        for group in self._all_or(groups):
            state = self.optimizer.optimizer.state.get(self._masters[group])
            if not state:
                self._packed.pop(group, None)
            elif not self._is_hidden(state[MOMENTS[0]]):
                self._packed[group] = self._packed_again(group, state)
                self._hide(group)
            elif group in self._loaded:
                self._packed[group] = self._loaded.pop(group)
        if groups is None:
            self._loaded.clear()

    def _packed_again(self, group: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the moments in ``state``, packed to the nearest; values that were not changed keep their bits."""
        before = self._packed.get(group)
        packed: dict[str, Tensor] = {}
        for key in MOMENTS:
            packed |= (
                self._form.pack(key, state[key]) if before is None else self._form.pack_again(key, state[key], before)
            )
        return packed

    # --------------------------------------------------------------------- checkpoints

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        state = self.optimizer.optimizer.state
        for group, packed in self._packed.items():
            of_group = state[self._masters[group]]
            for key in MOMENTS:
                del of_group[key]
            of_group.update(packed)
        try:
            yield
        finally:
            for group, packed in self._packed.items():
                for name in packed:
                    del state[self._masters[group]][name]
                self._hide(group)

    def before_load(self, state_dict: dict[str, Any]) -> None:
        base, _ = sections(state_dict)
        for index, state in base["state"].items():
            packed = self._form.found(state)
            if packed is None:
                continue
            master = self._masters[index]
            self._loaded[index] = {name: self._loaded_moment(tensor) for name, tensor in packed.items()}
            base["state"][index] = {
                **{key: value for key, value in state.items() if key not in packed},
                **dict.fromkeys(MOMENTS, self._zero.expand(master.numel())),
            }

    def _loaded_moment(self, tensor: Tensor) -> Tensor:
        """Return what is kept of a packed moment's ``tensor``, of a file, until `adopt`."""
        return tensor.to(self._masters[0].device, copy=True)

    def keep_readable(self, state_dict: dict[str, Any]) -> None:
        """Keep what `as_saved` shows: `_hide` changes the dicts of moments in place."""
        base, _ = sections(state_dict)
        base["state"] = {index: dict(state) for index, state in base["state"].items()}

    # ------------------------------------------------------------------------- memory

    def bytes(self) -> StateBytes:
        return StateBytes(storage_bytes(tensor for packed in self._packed.values() for tensor in packed.values()))

    def scratch_bytes(self) -> int:
        """Return the bytes of the buffer in which moments are updated; 0 before the first update."""
        return 0 if self._scratch is None else self._scratch.nbytes
