"""The window of an optimizer step: opened by the first forward, backward or gradient, and closed exactly once.

[Note: The window] A step's window holds what belongs to one optimizer step and to no other: what is frozen, the
explore stream, the gradient buffers and sums, the blocks that have received a gradient, the blocks that ran. It opens
at the first forward with gradients enabled (through the engine, ``engine.module`` or a part of it), or at the first
backward or gradient if no forward was seen, and closes

- at the end of the step, applied or skipped (`stepping`);
- with an exception in backward or in the step, and when a checkpoint is loaded (`abandon`): all gradients of the
  window are dropped and DeepSpeed's own record of them, so that the next backward begins a new window. The plan
  stands.

An exception in forward leaves the window as it is: it produced no gradient. ``zero_grad`` drops what an explore
step has scored; otherwise it does what DeepSpeed's does with its stage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING
from weakref import ref

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ds_agsel.errors import TrainingError
from ds_agsel.samples.rows import RowChoice
from ds_agsel.samples.support import SupportData
from ds_agsel.selection import Selection
from ds_agsel.zero.activation_checkpointing import InputGradients
from ds_agsel.zero.forward_watch import ForwardWatch, is_in_backward
from ds_agsel.zero.freezing import FreezeMask
from ds_agsel.zero.rows import row_choice, run_support

if TYPE_CHECKING:
    from ds_agsel.zero.selective import SelectiveStep

logger = logging.getLogger("ds_agsel")

NOT_RUN, NO_GRADIENT, GRADIENT = range(3)  # a block's outcome in the window; the largest over all ranks counts

_OWNERS = WeakIdKeyDictionary()  # parameter -> weak reference to the window that trains it


class StepWindow:
    """The one owner of a step's window, [Note: The window]. Made with the optimizer; `watch` gives it the model."""

    def __init__(self, selection: Selection, stage: SelectiveStep) -> None:
        self._selection, self._stage = selection, stage
        self._mask = FreezeMask()
        self._watch: ForwardWatch | None = None
        self._input_gradients: InputGradients | None = None
        self._rows: RowChoice | None = None
        self._root: nn.Module | None = None
        self._support_data: SupportData | None = None
        self._in_step = False
        self._backward_is_running = False
        self._is_retired = False
        self._told: set[int] = set()
        self.is_open = False
        self._parameters = [
            [selection.parameters[name] for name in block.parameter_names] for block in selection.blocks
        ]
        every = [parameter for parameters in self._parameters for parameter in parameters]
        retire(every)
        _OWNERS.update((parameter, ref(self)) for parameter in every)

    def watch(self, root: nn.Module, support_data: SupportData | None = None) -> None:
        """Open at the forwards of ``root`` and of its parts from now on, and know which blocks ran in them."""
        block_of = {id(p): block for block, parameters in enumerate(self._parameters) for p in parameters}
        wholes = [block.layer or block.name for block in self._selection.blocks]
        self._watch = ForwardWatch(root, block_of, self._begin_forward, wholes)
        self._input_gradients = InputGradients(root)
        self._rows = row_choice(root, self._selection, block_of)
        self._root, self._support_data = root, support_data

    # ------------------------------------------------------------------------ open

    def refuse_if_retired(self) -> None:
        """Raise TrainingError if another engine has taken the model over."""
        if self._is_retired:
            raise TrainingError(
                "this engine's model was given to another engine, which trains it now, or the engine was destroyed. "
                "Train with the newer engine, or make another one: ds_agsel.initialize."
            )

    def _begin_forward(self) -> None:
        if self._backward_is_running:
            self.abandon()  # an exception ended it out of our sight: loss.backward()
        self.prepare()
        if self._rows is not None and self.is_open:
            step, carriers = self._selection.plan.step, self._stage.carriers
            changes_nothing = carriers is not None and carriers.is_calibrating
            self._rows.begin_forward(step, () if changes_nothing else self._selection.active_blocks)
            if self._rows.needs_support and self._root is not None and self._support_data is not None:
                run_support(self._stage, self._root, self._rows, self._support_data, step)

    def open(self) -> None:
        """Prepare for the planned step. Idempotent. Raises ConfigError if the policy has no plan."""
        if self.is_open:
            return
        _ = self._selection.plan
        self._stage._blocks_with_gradient.clear()
        if self._watch is not None:
            self._watch.forget()
        self._stage._begin_window()
        self.is_open = True

    def prepare(self) -> None:
        """Open the window, and freeze what this step does not need.

        Called before a forward, and before a backward for the parts that it recomputes.
        """
        if self._is_retired:
            return
        self.open()
        if self._input_gradients is not None:
            self._input_gradients.take_over()  # a framework may switch checkpointing on at any time
        if self._stage.carriers is not None:
            self._stage.carriers.gather_from(set(self._stage.needed_blocks()))
        wanted = set(self._stage.blocks_in_backward())
        unwanted = [parameters for block, parameters in enumerate(self._parameters) if block not in wanted]
        self._mask.put(chain.from_iterable(unwanted))

    def begin_backward(self) -> None:
        """Note that DeepSpeed's backward begins."""
        self.prepare()
        self._backward_is_running = True

    def end_backward(self) -> None:
        """Note that DeepSpeed's backward is over, its epilogue included."""
        self._backward_is_running = False
        self._mask.lift()

    def lift(self) -> None:
        """Give the parameters the ``requires_grad`` that the user wants, until the next forward or backward."""
        self._mask.lift()

    # ----------------------------------------------------------------------- close

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run the step inside. The window is closed after it, or abandoned if it fails."""
        self._in_step = True
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            self._in_step = False
        self._close()

    def _close(self) -> None:
        self._mask.lift()
        if self._rows is not None:
            self._rows.close()
        self._backward_is_running = self.is_open = False

    def abandon(self) -> None:
        """Drop the window with all its gradients; the plan stands for the next one. Idempotent."""
        was_open, self.is_open = self.is_open, False
        self._close()
        if was_open:
            self._stage._forget_gradients()
            self._selection.skip()

    def zero_grad(self) -> None:
        """Handle the user's dropping of gradients between two backwards; ignore DeepSpeed's own within a step."""
        if self._in_step or not self.is_open:
            return
        if self._backward_is_running and not is_in_backward():
            self.abandon()
        elif self._stage._blocks_with_gradient:
            self._stage._restart_stream()

    def retire(self) -> None:
        """Release the model: remove hooks, mask and gradients. Idempotent."""
        if self._is_retired:
            return
        self.abandon()
        self._is_retired = True
        if self._watch is not None:
            self._watch.remove()
        if self._rows is not None:
            self._rows.remove()
        self._stage._remove_gradient_hooks()

    # ------------------------------------------------------- blocks without a gradient

    def _saw(self, block: int) -> int:
        if block in self._stage._blocks_with_gradient:
            return GRADIENT
        if not any(parameter.requires_grad for parameter in self._parameters[block]):
            return NOT_RUN  # the user has frozen all of it
        return NO_GRADIENT if self._watch is None or self._watch.has_run(block) else NOT_RUN

    def explains_silence(self) -> bool:
        """Return whether no planned block took part in this rank's forward, so that its loss needs no gradient."""
        watch = self._watch
        if not self.is_open or watch is None or not any(map(watch.has_run, range(len(self._parameters)))):
            return False  # nothing ran at all: the loss is not this model's
        return all(self._saw(block) == NOT_RUN for block in self._selection.active_blocks)

    def not_run(self, blocks: Sequence[int], refuse_dropped: bool) -> list[int]:
        """Return those of ``blocks`` that took part in no rank's forward. Collective, equal on all ranks.

        With ``refuse_dropped`` raises TrainingError, on every rank, for those that ran and got no gradient on any.
        """
        seen = [self._saw(block) for block in blocks]
        group = self._stage.dp_process_group
        if dist.get_world_size(group=group) > 1 and blocks:
            of_all = torch.tensor(seen, dtype=torch.int32, device=get_accelerator().current_device_name())
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
            if min(seen) < GRADIENT:  # otherwise the answer is known, and the host need not wait
                seen = of_all.tolist()
        if refuse_dropped:
            self._refuse_dropped([block for block, found in zip(blocks, seen) if found == NO_GRADIENT])
        return [block for block, found in zip(blocks, seen) if found == NOT_RUN]

    def require_gradients(self, blocks: Sequence[int]) -> None:
        """Raise TrainingError if one of ``blocks`` ran and got no gradient, as far as this rank knows."""
        self._refuse_dropped([block for block in blocks if self._saw(block) == NO_GRADIENT])

    def _refuse_dropped(self, blocks: Sequence[int]) -> None:
        """Raise TrainingError if there are ``blocks``: selected ones that received no gradient."""
        silent = [self._selection.blocks[block].name for block in blocks]
        if silent:
            raise TrainingError(
                f"step {self._selection.plan.step}: the selected block(s) {', '.join(silent)} took part in forward, "
                "but no parameter received a gradient: it was dropped on the way. With activation checkpointing, set "
                "use_reentrant=False or call model.enable_input_require_grads(): the reentrant form drops the "
                "gradients of a segment whose inputs require none. Otherwise look for detach() and torch.no_grad() in "
                "forward, and for outputs that the loss does not use. A block that is never to be trained belongs in "
                "adagrad_select.never_select."
            )

    def tell_not_run(self, blocks: Sequence[int]) -> None:
        """Log, once a block and on rank 0, that ``blocks`` are left out of a step."""
        new = [block for block in blocks if block not in self._told]
        self._told.update(new)
        if new and dist.get_rank() == 0:
            logger.warning(
                "adagrad_select: step %d selected %s, but none of it took part in forward (or all of it is frozen): "
                "not updated and not counted. This is logged once per block.",
                self._selection.plan.step,
                ", ".join(self._selection.blocks[block].name for block in new),
            )


def lift(parameters: Iterable[nn.Parameter]) -> None:
    """Give ``parameters`` the ``requires_grad`` that the user wants, where a window has frozen some."""
    for window in _owners_of(parameters):
        window.lift()


def retire(parameters: Iterable[nn.Parameter]) -> None:
    """Retire the windows that train any of ``parameters``: another engine takes them over.

    DeepSpeed leaves the first engine's gradient hooks on the model, which would take the second one's gradients.
    """
    for window in _owners_of(parameters):
        window.retire()


def _owners_of(parameters: Iterable[nn.Parameter]) -> list[StepWindow]:
    owners = [_OWNERS[parameter]() for parameter in parameters if parameter in _OWNERS]
    return list(dict.fromkeys(owner for owner in owners if owner is not None))
