"""The base of the restricted ZeRO optimizers of all stages: the order of a step, scores, hyperparameters.

A *group* here is what DeepSpeed steps at once, with one flat fp32 partition on this rank: a param group with stages
1 and 2, a sub-group of one with stage 3. Every group belongs to one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_agsel.param_groups import HyperparameterLink, ParamGroup
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.arrival_times import ArrivalTimes
from ds_agsel.zero.carriers import Carriers
from ds_agsel.zero.explore_stream import ExploreStream
from ds_agsel.zero.gradient_norms import BlockScores, GradientNorms
from ds_agsel.zero.host_adam import HostAdam
from ds_agsel.zero.reentry import Reentry
from ds_agsel.zero.repartition import (
    Layout,
    SavedStates,
    add_empty_states,
    convert_other_forms,
    drop_empty_states,
    state_dict_for,
)
from ds_agsel.zero.states.home import StateHome
from ds_agsel.zero.window import StepWindow

HOST_ADAM_KEY = "ds_agsel_host_adam"  # in DeepSpeed's state dict: [Note: Hidden Adam state] in host_adam


class SelectiveStep(GradientNorms, compat.ChecksOverrides):
    """Base of a restricted optimizer class, before DeepSpeed's own in the order of bases.

    Attributes:
        _group_of_param: group of each parameter, by a number from 0 that counts parameters, equal on all ranks. Set
            before `_attach`.
    """

    selection: Selection
    home: StateHome
    _group_of_param: Mapping[int, int]

    def _attach(
        self, selection: Selection, block_of_group: Sequence[int], link: HyperparameterLink, home: StateHome
    ) -> None:
        self.selection = selection
        self.home = home
        self._link = link
        self._block_of_group = tuple(block_of_group)
        self._groups_of_block: dict[int, list[int]] = {}
        for group, block in enumerate(block_of_group):
            self._groups_of_block.setdefault(block, []).append(group)
        self._shown_groups: Sequence[int] = range(len(block_of_group))
        self._blocks_with_gradient: set[int] = set()
        self._overflow_is_known = False
        self._attach_norms()
        self._stream: ExploreStream | None = None
        self._arrivals: ArrivalTimes | None = None
        self.window = StepWindow(selection, self)
        self._reentry = Reentry(self, selection, home, self._unlink_states)
        self._host_adam = HostAdam(self.optimizer) if self._steps_with_hidden_state() else None
        self.carriers: Carriers | None = None  # with `sparse_grad`
        self._entered: list[tuple[int, int]] = []  # index in DeepSpeed's lists, group; whose states are being updated

    def _steps_with_hidden_state(self) -> bool:
        on_cpu = get_accelerator().device_name() == "cpu"
        return isinstance(self.optimizer, compat.DeepSpeedCPUAdam) or (
            isinstance(self.optimizer, compat.FusedAdam) and on_cpu
        )

    def _groups_of(self, blocks: Sequence[int]) -> list[int]:
        return sorted(group for block in set(blocks) for group in self._groups_of_block.get(block, ()))

    @property
    def _is_calibrating(self) -> bool:
        return self.carriers is not None and self.carriers.is_calibrating

    def needed_blocks(self) -> Sequence[int]:
        """Return the blocks whose gradients the next backward is for: while entries are chosen, all of the lottery."""
        return self.selection.lottery.active if self._is_calibrating else self.selection.active_blocks

    def blocks_in_backward(self) -> Sequence[int]:
        """Return the blocks that the next backward goes through, `needed_blocks` at least."""
        return self.needed_blocks()

    # -------------------------------------------------- what each stage does its way

    def _only(self, groups: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, DeepSpeed's own loops see ``groups`` and no others."""
        raise NotImplementedError

    def _complete_gradients(self, blocks: Sequence[int]) -> None:
        """Leave only this window's numbers in the gradients of ``blocks``, before they are read."""
        raise NotImplementedError

    def _drop_gradients(self, blocks: set[int]) -> None:
        """Forget the gradients of ``blocks``, which the choice has left out."""
        raise NotImplementedError

    def _begin_window(self) -> None:
        """Prepare for the planned step, whose window opens: no gradient has arrived."""
        self._blocks_with_gradient.clear()
        times_it = self.selection.policy.measures_times and self.selection.plan.blocks is None
        self._arrivals = ArrivalTimes(len(self.selection.blocks)) if times_it else None
        self._forget_norms()
        self._stream = self._new_stream() if self._can_stream() else None
        self._hold_gradient_buffers()
        self._prefetch()

    def _forget_gradients(self) -> None:
        """Drop every gradient of the window, and DeepSpeed's record of them."""
        self._blocks_with_gradient.clear()
        self._forget_norms()
        self._stream = None
        compat.forget_backward(self)
        self._drop_gradients(set(self._block_of_group))

    def _before_update(self, groups: Sequence[int]) -> None:
        """Allocate what the update of ``groups`` writes to."""

    def _hold_gradient_buffers(self) -> None:
        """Make the blocks whose gradients are needed now the only ones that buffers are held for."""
        raise NotImplementedError

    def _streamed_scores(self, blocks: Sequence[int]) -> BlockScores:
        """Start to score ``blocks``, all of whose gradients have come, in the middle of backward. Collective."""
        raise NotImplementedError

    def _keep_gradients(self, block: int, params: list[nn.Parameter]) -> None:
        """Move the gradients of ``block`` that ``params`` hold to the place from which the step reads them."""
        raise NotImplementedError

    def _forget_block(self, block: int) -> None:
        """Free the gradients of ``block``, kept before or not."""
        raise NotImplementedError

    def _after_update(self, groups: Sequence[int]) -> None:
        """Count what the update of ``groups`` wrote back, and link new states."""
        raise NotImplementedError

    # -------------------------------------------------------------------- step

    @compat.overrides
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Choose blocks if the step explores, then update the chosen blocks. Collective."""
        with self.window.stepping():
            self._step()

    def _step(self) -> None:
        self._link.push(self.optimizer.param_groups)
        selection = self.selection
        if self.carriers is not None and self.carriers.is_calibrating:
            self.carriers.end_calibration_window()
            return
        active = selection.active_blocks
        if selection.has_chosen:
            self._leave_out_what_did_not_run()
        self._complete_gradients(sorted(self._blocks_to_keep()))
        if not selection.has_chosen:
            scores = self._scores()
            if not torch.isfinite(scores).all():
                self._skip_step()
                return
            selection.choose(scores.tolist())
            if self._arrivals is not None:
                selection.take_times(self._arrivals.seconds(self.dp_process_group))
            self._leave_out_what_did_not_run()
        self._drop_gradients(set(active) - set(selection.selected_blocks))
        if not selection.selected_blocks:
            self._step_on_nothing()
            return
        if selection.wants_scores:
            selection.take_scores(selection.selected_blocks, self._scores().tolist())
        groups = self.home.begin(selection.selected_blocks)
        self._reentry.begin()
        self._before_update(groups)
        self._shown_groups = groups
        self._take_norms(groups)
        scaled = nullcontext() if self.carriers is None else self.carriers.stepping()
        with scaled, self._only(groups):
            try:
                super().step()
            finally:
                self._leave()
        if self.overflow:
            selection.skip()
            return
        self._after_update(groups)
        if self.carriers is not None:
            self.carriers.after_update(selection.selected_blocks)
        selection.commit()
        self._prefetch()

    def _leave_out_what_did_not_run(self) -> None:
        """Take blocks that took part in no rank's forward out of the step. Collective.

        Not if every block is updated: DeepSpeed then uses a gradient of zero. Raises TrainingError for
        planned blocks that ran and received no gradient; a chosen one's score, 0, has said so.
        """
        selection = self.selection
        if selection.selected_blocks == selection.lottery.active:
            self.window.require_gradients(selection.selected_blocks)
            return
        not_run = self.window.not_run(selection.selected_blocks, refuse_dropped=selection.plan.blocks is not None)
        self.window.tell_not_run(not_run)
        selection.leave_out(not_run)

    def _step_on_nothing(self) -> None:
        """Count a step in whose forward no selected block took part, and change nothing."""
        self.change_nothing(is_overflow=False, is_applied=True)
        self.selection.commit()
        self._prefetch()

    def change_nothing(self, is_overflow: bool, is_applied: bool) -> None:
        """End a step without an update. The engine's schedule goes on if ``is_applied``."""
        self.overflow = not is_applied
        self._global_grad_norm = 0.0
        self._update_scale(is_overflow)
        self._forget_gradients()

    def _skip_step(self) -> None:
        """Skip as DeepSpeed skips a step that overflowed, in any precision, without looking again."""
        self._overflow_is_known = True
        try:
            super().step()
        finally:
            self._overflow_is_known = False
        self.selection.skip()

    @compat.overrides
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=set_to_none)
        self.window.zero_grad()

    @compat.overrides
    def backward_prologue(self) -> None:
        self.window.begin_backward()
        if self._arrivals is not None:
            self._arrivals.begin()
        super().backward_prologue()

    @compat.overrides
    def backward_epilogue(self, *args: Any, **kwargs: Any) -> None:
        super().backward_epilogue(*args, **kwargs)
        self.window.end_backward()

    @compat.overrides
    def destroy(self) -> None:
        self.window.retire()
        super().destroy()

    # ------------------------------------------------- explore: [Note: Streaming top-k]

    def _can_stream(self) -> bool:
        """Return whether this step can free gradients in backward: it explores, and one backward gives all scores."""
        if self._is_calibrating:
            return False
        one_backward = self.gradient_accumulation_steps == 1 or self._explores_on_first_micro_batch()
        return self.selection.plan.blocks is None and one_backward

    def _explores_on_first_micro_batch(self) -> bool:
        return self.selection.config.explore_on == "first_micro_batch"

    def _new_stream(self) -> ExploreStream:
        numbers = Counter(self._block_of_group[group] for group in self._group_of_param.values())
        return ExploreStream(self.selection, numbers, self._streamed_scores, self._keep_gradients, self._forget_block)

    def _blocks_to_keep(self) -> set[int]:
        """Return the blocks whose gradients are kept for the step, as far as that is known."""
        if self._is_calibrating:
            return set()
        return set(self.selection.active_blocks) if self._stream is None else self._stream.kept

    def _wanted_blocks(self) -> Collection[int]:
        """Return the blocks whose gradients are not dropped on arrival."""
        is_over = self._stream is not None and self._stream.is_over
        return self._blocks_to_keep() if is_over or self._is_calibrating else self.selection.active_blocks

    def _choose_on_first_micro_batch(self) -> None:
        """Choose now: the rest of the window is an exploit step's. Not if the scores make the step be skipped."""
        scores = self._scores()
        stream = self._stream
        if stream is not None and torch.isfinite(scores).all():
            self._stream = None
            self._forget_norms()  # the other micro-batches change the gradients
            for block in stream.kept.difference(self.selection.choose(scores.tolist())):
                self._forget_block(block)
            self._hold_gradient_buffers()

    def _restart_stream(self) -> None:
        """Drop the gradients that an explore step has scored, at the user's request."""
        if self._stream is not None:
            self._forget_gradients()
            self._begin_window()

    def _remove_gradient_hooks(self) -> None:
        compat.remove_gradient_hooks(self)

    # ------------------------------------------------------------------------ states

    def _prefetch(self) -> None:
        """Start to bring the states of the planned blocks, during all of forward and backward. Idempotent."""
        planned = self.selection.planned_blocks
        self._reentry.plan(planned)
        self.home.prefetch(planned)

    def _enter(self, shown: int) -> None:
        """Make the state of the group at index ``shown`` of DeepSpeed's lists ready for its update, and no other."""
        self._leave()
        self._enter_too(shown)

    def _enter_too(self, shown: int) -> None:
        """As `_enter`; the states entered before stay."""
        group = self._shown_groups[shown]
        self._reentry.before_update()
        self.home.enter(shown, group)
        self._entered.append((shown, group))
        if self.home.masters_are_split and self._updates_on_host():
            self.selection.current_traffic.d2h_bytes += compat.partition_weights(self, shown).nbytes
        self._reentry.entered(shown, self._block_of_group[group])

    def _leave(self) -> None:
        """Return the states that have been entered to their home, unless that is done."""
        entered, self._entered = self._entered, []
        for shown, group in entered:
            self.home.leave(shown, group)

    @property
    def states_are_on_disk(self) -> bool:
        """Whether a load must leave the states of a file on disk until they are read."""
        return self.home.is_on_disk

    def resident_state_bytes(self) -> int:
        """Return the bytes of visiting states on this rank's accelerator now, master weights included.

        0 if they don't visit: they are then all on the host (CPU offload), or all on the accelerator.
        """
        return self.home.bytes().visiting

    def state_bytes(self) -> int:
        """Return the bytes of the Adam moments that exist on this rank."""
        return self.home.bytes().moments

    def accelerator_state_bytes(self) -> int:
        """Return the bytes of Adam moments on this rank's accelerator now: those that visit it, all, or none."""
        held = self.home.bytes()
        if held.visiting_moments is not None:
            return held.visiting_moments
        return 0 if self._updates_on_host() else held.moments

    # ------------------------------------------------------ hyperparameters, states

    @compat.overrides
    def _get_param_groups(self) -> list[ParamGroup]:
        self._link.push(self.optimizer.param_groups)
        return self.optimizer.param_groups

    @compat.overrides
    def _set_param_groups(self, value: list[ParamGroup]) -> None:
        super()._set_param_groups(value)

    param_groups = property(_get_param_groups, _set_param_groups)

    def _unlink_states(self, groups: Sequence[int]) -> None:
        """Let go of the moments of ``groups``, which their home has released."""

    def group_of(self, param: nn.Parameter) -> int:
        """Return the group of ``param``."""
        raise NotImplementedError

    def layouts(self) -> list[Layout]:
        """Return the layout of this rank's partition of each group."""
        raise NotImplementedError

    @compat.overrides
    def state_dict(self) -> dict[str, Any]:
        with self.home.as_saved():
            state_dict = super().state_dict()
            self.home.keep_readable(state_dict)
        add_empty_states(state_dict)
        if self._host_adam is not None:
            state_dict[HOST_ADAM_KEY] = self._host_adam.state_dict()
        return state_dict

    def _weights_follow(self) -> AbstractContextManager[None]:
        """Inside, a load of master weights reaches the model weights wherever they are."""
        return nullcontext()

    @compat.overrides
    def load_state_dict(self, state_dict_list: Sequence[dict[str, Any] | None], **kwargs: Any) -> None:
        for state_dict in state_dict_list:
            if state_dict is not None:
                drop_empty_states(state_dict)
        rank = dist.get_rank(group=self.dp_process_group)
        own = state_dict_list[rank] if rank < len(state_dict_list) else None
        if own is not None and kwargs.get("load_optimizer_states", True):
            convert_other_forms(own, self.selection.config.state_dtype, rank, self.home.fp32_room)
            self.home.before_load(own)
        with self.home.writable(), self._weights_follow():
            super().load_state_dict(state_dict_list=state_dict_list, **kwargs)
        if self._host_adam is not None:
            self._host_adam.load_state_dict((own or {}).get(HOST_ADAM_KEY, {}))
        self._link.pull(self.optimizer.param_groups)

    @compat.overrides
    def refresh_fp32_params(self) -> None:
        with self.home.writable():
            super().refresh_fp32_params()

    def load_by_name(self, saved: SavedStates, **kwargs: Any) -> None:
        """Load what any number of ranks saved, [Note: By name] in `repartition`. Collective."""
        own = state_dict_for(super().state_dict(), self.layouts(), self.optimizer, saved)
        rank = dist.get_rank(group=self.dp_process_group)
        self.load_state_dict([own if other == rank else None for other in range(rank + 1)], **kwargs)

    def held_gradient_bytes(self) -> tuple[int, int]:
        """Return the bytes held for gradients now, on this rank: (on the accelerator, on the host by ZeRO-Offload)."""
        raise NotImplementedError
