"""ZeRO-3 with ``offload_optimizer.device: nvme``: states come from a file and go back to it as their group is updated.

[Note: Taken over] DeepSpeed's own swapper reads a sub-group's states and its gradients in one operation, so that states
can't be read before there are gradients, and the engine loads no checkpoint of what it holds (engine.py:4456). It makes
the fp32 partitions, which never are in memory all at once; then `SwappedStates` takes them over, and for DeepSpeed's
code this is offload to the host from there on: gradients of the step's blocks are in host memory, checkpoints have the
form of offload to the host, and can be loaded with it and the other way round.

[Note: Not there] A partition and a moment that lie in the file are seen as one zero, repeated: of the right shape, in
no room. Whoever looks at numbers shows them first (`shown_states`).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.residency.swap import MASTER, MOMENTS, SwappedStates
from ds_agsel.residency.swap_plan import FileLayout, default_ring
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.accessors import ZeroParameter
from ds_agsel.zero.repartition import sections, set_masters
from ds_agsel.zero.stage3 import SelectiveZero3Optimizer

_ELEMENT_BYTES = 4  # fp32


class NvmeZero3Optimizer(SelectiveZero3Optimizer):
    """A `SelectiveZero3Optimizer` whose states live in a file."""

    states_are_on_disk = True

    def attach(
        self,
        selection: Selection,
        block_of_group: Sequence[int],
        link: HyperparameterLink,
        states_visit: bool = False,
    ) -> None:
        """`SelectiveZero3Optimizer.attach`, and [Note: Taken over]."""
        settings, files = compat.take_swapper(self)
        alignment = mmap.ALLOCATIONGRANULARITY * settings.threads // _ELEMENT_BYTES
        layout = FileLayout(dict(enumerate(self.fp16_partitioned_groups_flat_numel)), alignment)
        capacity = ring_bytes(layout, self._groups_by_block(block_of_group), selection) // _ELEMENT_BYTES
        self._swapped = SwappedStates(settings.folder, layout, settings.new_handle, capacity, self._count_transfer)
        self._masters = tuple(self.fp32_partitioned_groups_flat)  # also where DeepSpeed is shown some of them
        for group, partition in enumerate(self._masters):
            file = files.get(group)
            master = partition if file is None else torch.from_file(str(file), size=layout.numels[group])
            self._swapped.store(group, {MASTER: master.detach()})
            self._hide(group)
            if file is not None:
                file.unlink()
        super().attach(selection, block_of_group, link, states_visit)

    def _groups_by_block(self, block_of_group: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for group in range(len(self.fp32_partitioned_groups_flat)):
            found.setdefault(block_of_group[self.sub_group_to_group_id[group]], []).append(group)
        return found

    def _count_transfer(self, kind: str, size: int) -> None:
        traffic = self.selection.current_traffic
        if kind == "read":
            traffic.nvme_read_bytes += size
        else:
            traffic.nvme_written_bytes += size

    # -------------------------------------------------------------------------- step

    def _prefetch(self) -> None:
        super()._prefetch()
        if self.selection.planned_blocks is not None:
            self._swapped.start(self._groups_of(self.selection.planned_blocks))

    def _begin_update(self, blocks: Sequence[int]) -> list[int]:
        groups = super()._begin_update(blocks)
        self._swapped.start(groups)
        return groups

    def _prepare_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        super()._prepare_sub_group(sub_group_id, timer_names)
        group = self._shown_groups[sub_group_id]
        self._show(group, self._swapped.enter(group))

    def _release_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        group = self._shown_groups[sub_group_id]
        self._hide(group)
        self._swapped.leave(group)
        super()._release_sub_group(sub_group_id, timer_names)

    # ---------------------------------------------------------------- [Note: Not there]

    def _show(self, group: int, tensors: dict[str, Tensor]) -> None:
        partition = self._masters[group]
        partition.data = tensors[MASTER]
        moments = {key: tensors[key] for key in MOMENTS if key in tensors}
        if moments:
            state = self.optimizer.state[partition]
            state.setdefault("step", compat.adam_step(self.optimizer, 0))
            state.update(moments)

    def _hide(self, group: int) -> None:
        partition = self._masters[group]
        nothing = torch.zeros(1).expand(self._swapped.layout.numels[group])
        partition.data = nothing
        state = self.optimizer.state.get(partition)
        if state:
            state.update(dict.fromkeys(MOMENTS, nothing))

    @contextmanager
    def shown_states(self, groups: Iterable[int] | None = None, to_be_changed: bool = False) -> Iterator[None]:
        """Inside, the states of ``groups`` (None: of all) are their file, mapped into memory.

        ``to_be_changed``: what stands in their place at the end is stored.
        """
        groups = tuple(self._swapped.layout.numels if groups is None else groups)
        if to_be_changed:
            self._swapped.forget()
        for group in groups:
            self._show(group, self._swapped.mapped(group))
        try:
            yield
        finally:
            for group in groups:
                if to_be_changed:
                    state = self.optimizer.state.get(self._masters[group]) or {}
                    moments = {key: state[key] for key in MOMENTS if key in state}
                    self._swapped.store(group, {MASTER: self._masters[group].detach(), **moments})
                self._hide(group)

    def get_full_hp_param(self, param: ZeroParameter, optim_state_key: str | None = None) -> Tensor | None:
        with self.shown_states([self._sub_group_of(param)]):
            return super().get_full_hp_param(param, optim_state_key)

    def get_local_fp32_param(self, param: ZeroParameter, optim_state_key: str | None = None) -> Tensor | None:
        with self.shown_states([self._sub_group_of(param)]):
            return super().get_local_fp32_param(param, optim_state_key)

    def set_local_hp_param(self, value: Tensor, param: ZeroParameter, optim_state_key: str | None = None) -> None:
        with self.shown_states([self._sub_group_of(param)], to_be_changed=True):
            super().set_local_hp_param(value, param, optim_state_key)

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(state[key].numel() * state[key].itemsize for state in states for key in MOMENTS if key in state)

    # ------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As with offload to the host; the tensors are parts of the file, and read as they are looked at."""
        with self.shown_states():
            state_dict = super().state_dict()
            base, masters = sections(state_dict)
            base["state"] = {index: dict(state) for index, state in base["state"].items()}
            set_masters(state_dict, [master.detach() for master in masters])
        return state_dict

    def load_state_dict(self, state_dict_list: Sequence[dict[str, Any] | None], **kwargs: Any) -> None:
        with self.shown_states(to_be_changed=True):
            super().load_state_dict(state_dict_list, **kwargs)

    def _restore_from_bit16_weights(self) -> None:
        with self.shown_states(to_be_changed=True):
            super()._restore_from_bit16_weights()


def ring_bytes(layout: FileLayout, groups_of_block: Mapping[int, Sequence[int]], selection: Selection) -> int:
    """Page-locked host memory for states: ``state_budget_bytes`` or, where that is null, `default_ring`.

    Raises ConfigError where a sub-group does not fit.
    """
    sizes = {block: _ELEMENT_BYTES * sum(map(layout.size, groups)) for block, groups in groups_of_block.items()}
    budget = selection.config.state_budget_bytes
    if budget is None:
        return default_ring(sizes.values(), selection.max_selected)
    largest = _ELEMENT_BYTES * max(map(layout.size, layout.numels))
    if budget < largest:
        raise ConfigError(
            f"adagrad_select.state_budget_bytes={budget} is less than the states of the largest sub-group, which take "
            f"{largest} bytes of page-locked host memory on this rank. Give at least that, or null."
        )
    return budget
