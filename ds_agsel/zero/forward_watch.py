"""Which blocks' modules ran in a step's forward passes, noted by hooks that a compiled layer keeps in its graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

RAN = "ds_agsel_ran"  # an attribute of a watched module: whether it ran in this forward


class _Forward:
    """Whether the outermost running forward began with gradients enabled.

    Reentrant activation checkpointing disables them in its segments, evaluation in the whole forward.
    """

    with_grad = False


def _note_run(module: nn.Module, inputs: Any) -> None:
    # One function for all modules, which reads and writes nothing but booleans: torch.compile takes it into a layer's
    # graph without a break, and compiles no layer anew for it (torch 2.13).
    if torch.is_grad_enabled() or _Forward.with_grad:
        setattr(module, RAN, True)


class ForwardWatch:
    """Calls back when the model's forward begins, and knows which blocks ran in it.

    Args:
        root: the model.
        block_of: block index by ``id`` of parameter.
        whole_of: what each block is a part of, itself or its layer; None: itself. Forwards inside a layer are not seen.
        begin: called when an outermost forward begins with gradients enabled, outside of a backward.

    [Note: Outermost] A user may call the model, or a part of it (``engine.module.model``, the base model within
    PEFT's). Every module with parameters of several layers has hooks; only the outermost running one counts.
    """

    def __init__(
        self,
        root: nn.Module,
        block_of: Mapping[int, int],
        begin: Callable[[], None],
        whole_of: Sequence[str] | None = None,
    ) -> None:
        self._begin = begin
        self._depth = 0
        self._error_before: BaseException | None = None
        self._modules: dict[int, list[nn.Module]] = {}
        self._watched: list[
            tuple[nn.Module, Collection[int]]
        ] = []  # and the blocks of each, of which there may be many
        self._ran: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._trunk: set[int] = set()  # ids of the modules with `_enter` and `_leave`; a copy has other ids
        self._watched += _owners(root, block_of)
        for module, blocks in self._watched:
            for block in blocks:
                self._modules.setdefault(block, []).append(module)
            setattr(module, RAN, False)
            self._handles.append(module.register_forward_pre_hook(_note_run))
        for module in root.modules():
            blocks = {block_of[id(p)] for p in module.parameters() if id(p) in block_of}
            wholes = blocks if whole_of is None else {whole_of[block] for block in blocks}
            if (module is root or len(wholes) > 1) and _has_forward(module):
                self._trunk.add(id(module))
                self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardWatch:
        return self  # a copy of the model gets the hooks too; they tell it from the model by `_trunk`

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Begin a new window, in which nothing has run."""
        self._ran.clear()
        self._clear_flags()

    def has_run(self, block: int) -> bool:
        """Return whether a module of ``block`` ran since `forget`; True if none is watched, so that it is unknown."""
        modules = self._modules.get(block)
        return modules is None or block in self._ran or any(_flag(module) for module in modules)

    def _clear_flags(self) -> None:
        for module, _ in self._watched:
            module.__dict__[RAN] = False

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or id(module) not in self._trunk:
            return
        self._depth += 1
        if self._depth > 1:
            return
        _Forward.with_grad = torch.is_grad_enabled()
        self._error_before = _error()
        if _Forward.with_grad and not is_in_backward():
            self._begin()
            self._clear_flags()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or id(module) not in self._trunk:
            return
        self._depth = max(0, self._depth - 1)
        if self._depth > 0:
            return
        with_grad, _Forward.with_grad = _Forward.with_grad, False
        if (
            with_grad and not is_in_backward() and _error() is self._error_before
        ):  # a forward that failed does not count
            for module, blocks in self._watched:
                if _flag(module):
                    self._ran.update(blocks)
        self._clear_flags()


def _owners(root: nn.Module, block_of: Mapping[int, int]) -> Iterator[tuple[nn.Module, Collection[int]]]:
    """Yield (module, blocks of its own parameters) for each module whose forward can be seen.

    What a list of parameters holds is its parent's. A scripted module can't be seen.
    """
    found: dict[int, tuple[nn.Module, set[int]]] = {}
    visited: set[int] = set()

    def visit(module: nn.Module, seer: nn.Module | None) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        seer = module if _has_forward(module) else seer
        blocks = {block_of[id(p)] for p in module.parameters(recurse=False) if id(p) in block_of}
        if seer is not None and blocks:
            found.setdefault(id(seer), (seer, set()))[1].update(blocks)
        for child in module.children():
            visit(child, seer)

    visit(root, None)
    yield from found.values()


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, torch.jit.ScriptModule)


def _flag(module: nn.Module) -> bool:
    return bool(module.__dict__.get(RAN))


def _error() -> BaseException | None:
    return sys.exc_info()[1]


def is_in_backward() -> bool:
    """Return whether the caller is inside a backward: a hook, or a checkpointed segment that is computed again."""
    return torch._C._current_graph_task_id() != -1
