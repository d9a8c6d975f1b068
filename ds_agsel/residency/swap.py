"""States in a file on NVMe: read for the groups that a step updates, and written back. Others do not move.

[Note: Direct I/O] The step's reads and writes go round the page cache, through DeepSpeed's asynchronous I/O op, from
and to page-locked buffers. The op does not look at the result of a write (csrc/aio/common/deepspeed_aio_common.cpp:110,
0.19.8): a full disk would silently give wrong numbers. The space is therefore reserved before the first write.

[Note: Anonymous file] The file has no name: its disk space is freed when the process ends, in any way, and no other
run can open it. The op opens it by its number in /proc.

[Note: Mapped] For access between steps (checkpoints, accessors) a group's part of the file is mapped into memory: the
kernel reads it page by page and evicts it again. It also keeps mapping and direct I/O coherent. What is made between
steps of states that rest in another form is in such a file too: all of it may be more than the host's memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_agsel.errors import TrainingError
from ds_agsel.residency.arena import Room, bytes_of
from ds_agsel.residency.swap_plan import FileLayout, Read, plan_reads

Rooms = Mapping[str, Room]  # of a group's tensors by name, that of the master weights first


def layout_of(rooms: Mapping[int, Rooms], alignment: int) -> FileLayout:
    """Return the places in a file of groups with the tensors ``rooms``."""
    sizes = {group: {name: bytes_of(room) for name, room in of_group.items()} for group, of_group in rooms.items()}
    return FileLayout(sizes, alignment)


class SwappedStates:
    """The states of some groups of this rank, in a file, as they rest.

    Args:
        folder: on the NVMe device, with a file system that does direct I/O.
        rooms: of each group's tensors.
        alignment: of the file's stretches, in bytes: a multiple of `mmap.ALLOCATIONGRANULARITY`.
        new_handle: makes a handle of DeepSpeed's AIO op, with queues and threads of its own.
        capacity: bytes of the ring, at least the largest group's. [Note: Ring] in swap_plan
        count: told of ("read" | "written", bytes) as they are issued.
    """

    def __init__(
        self,
        folder: Path,
        rooms: Mapping[int, Rooms],
        alignment: int,
        new_handle: Callable[[], Any],
        capacity: int,
        count: Callable[[str, int], None],
    ) -> None:
        self.rooms = rooms
        self.layout = layout_of(rooms, alignment)
        self._starts = self.layout.starts()
        self._places = {group: self.layout.places(group) for group in rooms}
        self._folder = folder
        self._new_handle = new_handle
        self._count = count
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 [Note: Anonymous file]
        self._path = f"/proc/self/fd/{self._file.fileno()}"
        os.ftruncate(self._file.fileno(), self.layout.total())
        self._idle: list[Any] = [new_handle()]
        self._ring: Tensor = self._idle[0].new_cpu_locked_tensor(capacity, torch.empty(0, dtype=torch.uint8))
        self._updated: set[int] = set()  # groups with moments in the file
        self._reserved: set[int] = set()  # groups whose master weights have room in it
        self._order: tuple[int, ...] = ()
        self._reads: tuple[Read, ...] = ()
        self._issued = 0
        self._entered: set[int] = set()
        self._arriving: dict[int, _Transfer] = {}
        self._writes: dict[int, _Transfer] = {}  # by place in the order
        self._under_way: deque[_Transfer] = deque()
        weakref.finalize(self, _close, self._idle[0], self._ring, self._under_way)

    # ------------------------------------------------------------------------- step

    def start(self, order: Sequence[int]) -> None:
        """Begin to read the groups of ``order``, which the next step updates in it, as far as the ring goes.

        Idempotent until the first of them is entered. What was read for another order is forgotten.
        """
        if self._order == tuple(order) and not self._entered:
            return
        self.forget()
        self._order = tuple(order)
        self._reads = plan_reads(self._order, self.layout, self._ring.numel())
        self._issue(written=0)

    def enter(self, group: int) -> dict[str, Tensor]:
        """Return all tensors of ``group``, (elements,), to be updated. The host waits for them.

        What a group's first update finds in those of the moments are zeros.
        """
        place = self._order.index(group)
        self._issue(needed=place)
        arriving = self._arriving.pop(group, None)
        if arriving is None:
            raise TrainingError(f"the states of group {group} are asked for, and were not read for this step.")
        arriving.wait()
        self._entered.add(group)
        held = self._held(self._reads[place])
        if group not in self._updated:
            held[self.layout.master_size(group) :].zero_()
        return {
            name: held[place : place + bytes_of(room)].view(room[1])
            for (name, room), place in zip(self.rooms[group].items(), self._places[group].values(), strict=True)
        }

    def leave(self, group: int) -> None:
        """Write the updated ``group`` back, and read ahead as far as the ring now has room."""
        place = self._order.index(group)
        held = self._held(self._reads[place])
        if group not in self._updated:
            self._reserve(group)
            self._updated.add(group)
        self._writes[place] = self._transfer("async_pwrite", [(held, self._starts[group])])
        self._count("written", held.nbytes)
        # A write may take as long as the next group's update before anything waits for it.
        self._issue(written=place)

    def _issue(self, needed: int = -1, written: int = 0) -> None:
        """Begin the next reads: all up to the ``needed``-th, and those that wait for less than ``written`` groups."""
        due = []
        while self._issued < len(self._reads):
            read = self._reads[self._issued]
            if self._issued > needed and read.after >= written:
                break
            due.append(read)
            self._issued += 1
        if not due:
            return
        for place in [place for place in self._writes if place <= due[-1].after]:
            self._writes.pop(place).wait()
        parts = []
        for read in due:
            held = self._held(read)
            wanted = held if read.group in self._updated else held[: self.layout.master_size(read.group)]
            parts.append((wanted, self._starts[read.group]))
            self._count("read", wanted.nbytes)
        transfer = self._transfer("async_pread", parts)
        self._arriving |= dict.fromkeys((read.group for read in due), transfer)

    def _held(self, read: Read) -> Tensor:
        return self._ring.narrow(0, read.at, self.layout.size(read.group))

    def forget(self) -> None:
        """Wait for transfers in flight, and discard what was read."""
        while self._under_way:
            self._under_way[0].wait()
        self._writes.clear()
        self._arriving.clear()
        self._entered.clear()
        self._order, self._reads, self._issued = (), (), 0

    # ------------------------------------------------------------ between the steps

    def mapped(self, group: int) -> dict[str, Tensor]:
        """Return the tensors of ``group`` as mapped from the file: what it has of master weights and moments.

        Each has a storage of its own. What is written to them changes the file: then `forget` first. [Note: Mapped]
        """
        for write in tuple(self._writes.values()):
            write.wait()
        layout = self.layout
        size = layout.size(group) if group in self._updated else layout.master_size(group)
        part = mmap.mmap(self._file.fileno(), size, offset=self._starts[group])
        return {
            name: _tensor_of(part, room, self._places[group][name])
            for name, room in self.rooms[group].items()
            if self._places[group][name] < size
        }

    def store(self, group: int, tensors: Mapping[str, Tensor]) -> None:
        """Put ``tensors``, by name, in the place of those in the file; of the moments all or none. Others stay."""
        self.forget()
        if tensors.keys() - {self._master_of(group)} and group not in self._updated:
            self._reserve(group)
            self._updated.add(group)
        elif group not in self._reserved:
            self._reserve(group, self.layout.master_size(group))
        there = self.mapped(group)
        for name, tensor in tensors.items():
            there[name].copy_(tensor)
        os.fdatasync(self._file.fileno())

    def _master_of(self, group: int) -> str:
        return next(iter(self.rooms[group]))

    def drop(self, group: int) -> None:
        """Forget the moments of ``group``, which is not in the ring. The file keeps the room for them."""
        self._updated.discard(group)

    def room(self, numel: int) -> Tensor:
        """Return (numel,) zeros, fp32, mapped from a file of their own in the same folder: [Note: Mapped]."""
        with tempfile.TemporaryFile(dir=self._folder) as file:  # its memory outlives its number
            _allocate(file.fileno(), 0, max(1, 4 * numel), "what is made of states for a load, a save or a read")
            return _tensor_of(mmap.mmap(file.fileno(), max(1, 4 * numel)), (numel, torch.float32), 0)

    def has_moments(self, group: int) -> bool:
        """Return whether ``group`` has been updated."""
        return group in self._updated

    def file_bytes(self) -> int:
        """Return the file's present size on the disk, in bytes."""
        return os.fstat(self._file.fileno()).st_blocks * 512

    def ring_bytes(self) -> int:
        """Return the page-locked bytes of the host."""
        return self._ring.nbytes

    def _reserve(self, group: int, size: int | None = None) -> None:
        """Reserve disk space for the first ``size`` bytes of ``group``, None: for all; see [Note: Direct I/O]."""
        total = self.layout.total()
        what = f"optimizer state. All blocks' states together take {total} bytes a rank"
        _allocate(self._file.fileno(), self._starts[group], self.layout.size(group) if size is None else size, what)
        self._reserved.add(group)

    # --------------------------------------------------------------------- transfers

    def _transfer(self, operation: str, parts: Sequence[tuple[Tensor, int]]) -> _Transfer:
        transfer = _Transfer(self._idle.pop() if self._idle else self._new_handle(), self._under_way, self._idle)
        for tensor, start in parts:
            transfer.issue(operation, tensor, self._path, start)
        return transfer


class _Transfer:
    """Reads or writes issued together on one handle: a wait covers all transfers of a handle."""

    def __init__(self, handle: Any, under_way: deque[_Transfer], idle: list[Any]) -> None:
        self._handle = handle
        self._issued = 0
        self._under_way = under_way
        self._idle = idle
        under_way.append(self)

    def issue(self, operation: str, tensor: Tensor, path: str, offset_bytes: int) -> None:
        if getattr(self._handle, operation)(tensor, path, offset_bytes) != 0:
            raise TrainingError(f"{operation} of {tensor.nbytes} bytes in offload_optimizer.nvme_path failed.")
        self._issued += 1

    def wait(self) -> None:
        """Wait until they have passed. Idempotent."""
        if self not in self._under_way:
            return
        done = self._handle.wait() if self._issued else 0
        self._under_way.remove(self)
        self._idle.append(self._handle)
        if done != self._issued:
            raise TrainingError(f"{self._issued - done} transfers of {self._issued} to nvme_path failed.")


def _close(handle: Any, ring: Tensor, under_way: deque[_Transfer]) -> None:
    """Wait for the transfers ``under_way``, then free the ring.

    A handle must have no transfer in flight when it is destroyed (deepspeed_py_io_handle.cpp:196).
    """
    while under_way:
        under_way[0].wait()
    handle.free_cpu_locked_tensor(ring)


def _tensor_of(part: mmap.mmap, room: Room, place: int) -> Tensor:
    numel, dtype = room
    return torch.frombuffer(part, dtype=dtype, count=numel, offset=place) if numel else torch.empty(0, dtype=dtype)


def _allocate(file: int, start: int, size: int, what: str) -> None:
    """Reserve disk space. Raises TrainingError where there is none."""
    try:
        os.posix_fallocate(file, start, size)
    except OSError as error:
        raise TrainingError(
            f"no room in offload_optimizer.nvme_path ({error}) for {size} bytes of {what}. "
            "Make room, or name another path."
        ) from error
