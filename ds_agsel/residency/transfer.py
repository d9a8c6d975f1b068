"""Carries out a plan's moves: pinned host memory, one stream for each direction, events. No ZeRO and no selection.

[Note: Waits] The host waits only in `bring_home`. Between the streams there are seven waits, and each is
needed: a leaving state is copied after the compute stream's update of it (1); what arrives takes memory that has been
freed, and bytes that have been written to the host, only after the copy of the leaving state (2); an update begins
after its block's arrival (3); the host reads what was copied to it after the copy's event (4); what arrives takes
the memory of dropped tensors only after the compute stream's update of them (5). Where gaps in the arena are closed
([Note: Arena] in arena.py), what is there moves after the compute stream's update of it (6), and is copied to the host
after it has moved (7); an update of it waits as for an arrival. What writes to the arena, except updates, is on the
H2D stream. Host memory that is dropped while a copy to it is under way is held until that has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_agsel.errors import TrainingError
from ds_agsel.residency.arena import Arena, Room, capacity_for
from ds_agsel.residency.plan import Move
from ds_agsel.residency.states import MASTER, BlockResidency, Residency


@dataclass(frozen=True)
class HostState:
    """The state of one param group's partition as the host has it.

    Attributes:
        master: fp32, (numel,), or what is kept of it; on the host, or on the accelerator if it is not among the tensors
            that move.
        state: a dict, for fp32 moments the optimizer's own. The moments' tensors are in it from the first update on.
        rooms: (elements, dtype) of the moments' tensors by key. Left out: as the master's.
    """

    master: Tensor
    state: MutableMapping[str, Any]
    rooms: Mapping[str, Room] = field(default_factory=dict)

    def get(self, key: str) -> Tensor | None:
        """Return the tensor ``key``, or None if it does not exist yet."""
        return self.master if key == MASTER else self.state.get(key)

    def room(self, key: str) -> Room:
        """Return (elements, dtype) of the tensor ``key``, whether it exists yet or not."""
        return self.rooms.get(key, (self.master.numel(), self.master.dtype))

    def nbytes(self, key: str) -> int:
        """Return the bytes of the tensor ``key``, whether it exists yet or not."""
        numel, dtype = self.room(key)
        return numel * dtype.itemsize


class StateTransfer:
    """The states of all blocks: on the host, and on the accelerator those that moves have brought there.

    Args:
        device: a DeepSpeed accelerator object.
        states: of each param group.
        groups_of_block: block -> its param groups.
        keys: which of the tensors move, `MASTER` and those of moments. The others stay in place.
        count: told the direction ("h2d", "d2h") and the bytes of every copy.
        budget_bytes: that the moves keep to; the arena for them is allocated with the first one.
        new_moment: makes host memory, uninitialised, for a moment's tensor of a param group that has none yet.
    """

    def __init__(
        self,
        device: Any,
        states: Sequence[HostState],
        groups_of_block: Mapping[int, Sequence[int]],
        keys: Sequence[str],
        count: Callable[[str, int], None],
        budget_bytes: int,
        new_moment: Callable[[int, str], Tensor],
    ) -> None:
        self._device = device
        self._states = list(states)
        self._groups_of_block = groups_of_block
        self._keys = tuple(keys)
        self._count = count
        self._budget_bytes = budget_bytes
        self._new_moment = new_moment
        self._arena: Arena[tuple[int, str]] | None = None
        self._blocks = {block: BlockResidency(block) for block in groups_of_block}
        self._on_device: dict[int, dict[str, Tensor]] = {}  # by group
        self._arrived: dict[int, Any] = {}  # block -> event of its arrival, or of its last move in the arena
        self._copied: dict[int, Any] = {}  # block -> event of its last copy to the host, until it is known to be over
        self._dropped: list[tuple[Any, list[Tensor]]] = []  # host memory, and the event of the last copy to it
        synchronized = device.is_synchronized_device()
        self._h2d = None if synchronized else device.Stream()
        self._d2h = None if synchronized else device.Stream()
        self.peak_bytes = 0

    # ---------------------------------------------------------------- what is where

    @property
    def resident(self) -> frozenset[int]:
        """The blocks that are on the accelerator or on their way to it."""
        there = (Residency.ARRIVING, Residency.RESIDENT)
        return frozenset(block for block, state in self._blocks.items() if state.place in there)

    def place(self, block: int) -> Residency:
        """Return where ``block``'s state is, as far as moves have been issued."""
        return self._blocks[block].place

    def resident_bytes(self, key: str | None = None) -> int:
        """Return the bytes of states (those of ``key``) on the accelerator once all issued moves are done."""
        return sum(
            tensor.nbytes
            for tensors in self._on_device.values()
            for name, tensor in tensors.items()
            if key in (None, name)
        )

    @property
    def arena_bytes(self) -> int:
        """The bytes of accelerator memory that are held for states, used or not."""
        return 0 if self._arena is None else self._arena.nbytes

    @property
    def arena_moved_bytes(self) -> int:
        """The bytes that were copied so far to close gaps in the arena."""
        return 0 if self._arena is None else self._arena.moved_bytes

    def on_host(self, group: int) -> HostState:
        """Return the host's copy of a param group's state, current or not."""
        return self._states[group]

    def on_device(self, group: int) -> dict[str, Tensor]:
        """Return the tensors of a param group whose block is resident, by key."""
        return self._on_device[group]

    # ------------------------------------------------------------------------ moves

    def carry_out(self, moves: Iterable[Move]) -> None:
        """Issue ``moves``, in their order. Their blocks' earlier uses must have been issued on the current stream."""
        self._settle_what_has_left()
        for move in moves:
            if move.kind == "arrive":
                self._arrive(move.block)
            else:
                self._leave(move.block)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes())

    def _arrive(self, block: int) -> None:
        state = self._blocks[block]
        if state.place is Residency.LEAVING:  # orders copies from the host after copies to it
            state.become(Residency.ON_HOST)
        state.become(Residency.ARRIVING)
        groups = self._groups_of_block[block]
        rooms = self._rooms({(group, key): self._states[group].room(key) for group in groups for key in self._keys})
        with self._on(self._h2d):
            for group in groups:
                self._on_device[group] = {key: self._bring(group, key, rooms[group, key]) for key in self._keys}
            self._arrived[block] = self._event(self._h2d)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes())

    def _bring(self, group: int, key: str, target: Tensor) -> Tensor:
        source = self._states[group].get(key)
        if source is None:
            return target.zero_()
        target.copy_(source.detach(), non_blocking=True)
        self._count("h2d", source.nbytes)
        return target

    def _rooms(self, pieces: Mapping[tuple[int, str], Room]) -> dict[tuple[int, str], Tensor]:
        """Return memory in the arena for ``pieces``, by (param group, key)."""
        if self._arena is None:
            self._arena = self._new_arena()
        rooms = self._arena.take(pieces)
        if rooms is None:
            self._close_gaps(self._arena)
            rooms = self._arena.take(pieces)
        if rooms is None:
            raise TrainingError("states were to arrive for which their budget has no room.")
        return rooms

    def _new_arena(self) -> Arena[tuple[int, str]]:
        sizes = [state.nbytes(key) for state in self._states for key in self._keys]
        with self._on(self._h2d):
            return Arena(capacity_for(self._budget_bytes, sizes), self._device.current_device_name())

    def _close_gaps(self, arena: Arena[tuple[int, str]]) -> None:
        if self._h2d is not None:
            self._h2d.wait_stream(self._device.current_stream())  # (6)
        with self._on(self._h2d):
            moved = arena.close_gaps()
            for group, key in moved:
                self._on_device[group][key] = arena.tensor((group, key))
            of_moved = {group for group, _ in moved}
            for block, groups in self._groups_of_block.items():
                if of_moved.intersection(groups):
                    self._arrived[block] = self._event(self._h2d)

    def wait_for(self, block: int) -> None:
        """Let the current stream wait for the block's arrival: wait (3) of [Note: Waits]."""
        arrived = self._arrived.pop(block, None)
        if arrived is not None:
            self._device.current_stream().wait_event(arrived)
        if self._blocks[block].place is Residency.ARRIVING:
            self._blocks[block].become(Residency.RESIDENT)

    def updated(self, block: int) -> None:
        """Note that the current stream updates the block, and give new moments their host memory."""
        self._blocks[block].updated()
        for group in self._groups_of_block[block]:
            host = self._states[group]
            for key in set(self._keys) - {MASTER}:
                if host.get(key) is None:
                    host.state[key] = self._new_moment(group, key)

    def _leave(self, block: int) -> None:
        state = self._blocks[block]
        if state.place is Residency.ARRIVING:  # its memory is freed in the order of the stream it arrives on
            state.become(Residency.RESIDENT)
        state.become(Residency.LEAVING)
        self._copy_to_host(block)
        if self._h2d is not None and block in self._copied:
            self._h2d.wait_event(self._copied[block])  # (2)
        for group in self._groups_of_block[block]:
            self._free(group, self._on_device.pop(group))
        self._arrived.pop(block, None)

    def _copy_to_host(self, block: int) -> None:
        """Issue the copies that make the host's state of ``block`` current again."""
        state = self._blocks[block]
        if not state.host_is_stale:
            return
        if self._d2h is not None:
            self._d2h.wait_stream(self._device.current_stream())  # (1)
            if self._arrived.get(block) is not None:
                self._d2h.wait_event(self._arrived[block])  # (7)
        with self._on(self._d2h):
            for group in self._groups_of_block[block]:
                for key, source in self._on_device[group].items():
                    target = self._states[group].get(key)
                    if target is None:
                        raise RuntimeError(f"param group {group} has no {key} on the host, and was updated.")
                    target.detach().copy_(source.detach(), non_blocking=True)
                    self._count("d2h", source.nbytes)
            copied = self._event(self._d2h)
            if copied is not None:
                self._copied[block] = copied
        state.host_is_stale = False

    def drop(self, group: int, keys: Iterable[str]) -> None:
        """Free the tensors ``keys`` of ``group`` wherever they are, without a copy; its next visit makes zeros."""
        on_device = self._on_device.get(group, {})
        dropped = {key: on_device.pop(key) for key in keys if key in on_device}
        if dropped and self._h2d is not None:
            self._h2d.wait_stream(self._device.current_stream())  # (5)
        self._free(group, dropped)
        state = self._states[group].state
        on_host = [state.pop(key) for key in keys if key in state]
        block = next(block for block, groups in self._groups_of_block.items() if group in groups)
        if on_host and block in self._copied:
            self._dropped.append((self._copied[block], on_host))

    def _free(self, group: int, tensors: Mapping[str, Tensor]) -> None:
        """Give the places of ``tensors`` back, which other references name too."""
        if self._arena is not None:
            self._arena.give_back([(group, key) for key in tensors])
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def _settle_what_has_left(self) -> None:
        self._dropped = [held for held in self._dropped if not held[0].query()]
        for block, state in self._blocks.items():
            if state.place is Residency.LEAVING and (block not in self._copied or self._copied[block].query()):
                self._copied.pop(block, None)
                state.become(Residency.ON_HOST)

    def bring_home(self, blocks: Iterable[int]) -> None:
        """Make the host's states of ``blocks`` current without evicting them. The host waits: (4)."""
        blocks = tuple(blocks)
        for block in blocks:
            self._copy_to_host(block)
        for block in blocks:
            event = self._copied.pop(block, None)
            if event is not None:
                event.synchronize()
            if self._blocks[block].place is Residency.LEAVING:
                self._blocks[block].become(Residency.ON_HOST)

    def send_home(self, blocks: Iterable[int]) -> None:
        """Evict ``blocks`` and wait for it, so that their states can be modified on the host."""
        blocks = tuple(blocks)
        for block in blocks:
            if block in self.resident:
                self._leave(block)
        self.bring_home(blocks)

    def adopt(self, group: int, state: HostState) -> None:
        """Replace the host's state of ``group`` by ``state``. Streams and allocated memory are kept.

        Raises TrainingError unless the group's block is on the host alone.
        """
        block = next(block for block, groups in self._groups_of_block.items() if group in groups)
        place = self._blocks[block].place
        if place is not Residency.ON_HOST:
            raise TrainingError(f"the state of block {block} can't be replaced: it is {place.value}, not on host.")
        self._states[group] = state

    # ---------------------------------------------------------------------- streams

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        with self._device.stream(stream):
            yield

    def _event(self, stream: Any) -> Any:
        if stream is None:
            return None
        event = self._device.Event()
        event.record(stream)
        return event


def block_bytes(
    states: Sequence[HostState], groups_of_block: Mapping[int, Sequence[int]], keys: Sequence[str]
) -> dict[int, int]:
    """Return block -> bytes that its ``keys`` take on the accelerator, on this rank."""
    return {
        block: sum(states[group].nbytes(key) for group in groups for key in keys)
        for block, groups in groups_of_block.items()
    }
