"""States in a file on NVMe: read for the groups that a step updates, and written back. Others do not move.

[Note: Direct I/O] The step's reads and writes go round the page cache, through DeepSpeed's asynchronous I/O op, from
and to page-locked buffers. The op does not look at the result of a write (csrc/aio/common/deepspeed_aio_common.cpp:110,
0.19.8): a full disk would silently give wrong numbers. The space is therefore reserved before the first write.

[Note: Anonymous file] The file has no name: its disk space is freed when the process ends, in any way, and no other
run can open it. The op opens it by its number in /proc.

[Note: Mapped] For access between steps (checkpoints, accessors) a group's part of the file is mapped into memory: the
kernel reads it page by page and evicts it again. It also keeps mapping and direct I/O coherent.
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
from ds_agsel.residency.states import KEYS, MASTER, MOMENTS
from ds_agsel.residency.swap_plan import FileLayout, Read, plan_reads

_ELEMENT_BYTES = 4  # fp32


class SwappedStates:
    """The fp32 states of some groups of this rank, in a file.

    Args:
        folder: on the NVMe device, with a file system that does direct I/O.
        layout: of the file; its alignment in bytes must be a multiple of `mmap.ALLOCATIONGRANULARITY`.
        new_handle: makes a handle of DeepSpeed's AIO op, with queues and threads of its own.
        capacity: elements of the ring, at least the largest group's. [Note: Ring] in swap_plan
        count: told of ("read" | "written", bytes) as they are issued.
    """

    def __init__(
        self,
        folder: Path,
        layout: FileLayout,
        new_handle: Callable[[], Any],
        capacity: int,
        count: Callable[[str, int], None],
    ) -> None:
        self.layout = layout
        self._starts = layout.starts()
        self._new_handle = new_handle
        self._count = count
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 [Note: Anonymous file]
        self._path = f"/proc/self/fd/{self._file.fileno()}"
        os.ftruncate(self._file.fileno(), layout.total() * _ELEMENT_BYTES)
        self._idle: list[Any] = [new_handle()]
        self._ring: Tensor = self._idle[0].new_cpu_locked_tensor(capacity, torch.empty(0))
        self._updated: set[int] = set()  # groups with moments in the file
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
        """Return the master weights and moments of ``group``, (numel,), fp32, to be updated. The host waits for them.

        Those of a group's first update are zeros.
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
            held[self.layout.padded(group) :].zero_()
        return self._tensors(held, group, KEYS)

    def leave(self, group: int) -> None:
        """Write the updated ``group`` back, and read ahead as far as the ring now has room."""
        place = self._order.index(group)
        held = self._held(self._reads[place])
        if group not in self._updated:
            self._reserve(group, held.numel())
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
            wanted = held if read.group in self._updated else held[: self.layout.padded(read.group)]
            parts.append((wanted, self._starts[read.group]))
            self._count("read", wanted.nbytes)
        transfer = self._transfer("async_pread", parts)
        self._arriving |= dict.fromkeys((read.group for read in due), transfer)

    def _held(self, read: Read) -> Tensor:
        return self._ring.narrow(0, read.at, self.layout.size(read.group))

    def _tensors(self, flat: Tensor, group: int, keys: Sequence[str]) -> dict[str, Tensor]:
        padded, numel = self.layout.padded(group), self.layout.numels[group]
        return {key: flat.narrow(0, index * padded, numel) for index, key in enumerate(keys)}

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
        """Return the states of ``group`` as mapped from the file: the master weights and, if it has any, the moments.

        Tensors that are written to change the file: then `forget` first. [Note: Mapped]
        """
        for write in tuple(self._writes.values()):
            write.wait()
        keys = KEYS if group in self._updated else (MASTER,)
        size = len(keys) * self.layout.padded(group) * _ELEMENT_BYTES
        part = mmap.mmap(self._file.fileno(), size, offset=self._starts[group] * _ELEMENT_BYTES)
        return self._tensors(torch.frombuffer(part, dtype=torch.float32), group, keys)

    def store(self, group: int, states: Mapping[str, Tensor]) -> None:
        """Put ``states`` in the place of those in the file: the master weights and, or without, the moments."""
        self.forget()
        has_moments = all(key in states for key in MOMENTS)
        self._reserve(group, self.layout.size(group) if has_moments else self.layout.padded(group))
        (self._updated.add if has_moments else self._updated.discard)(group)
        for key, tensor in self.mapped(group).items():
            if tensor.data_ptr() != states[key].data_ptr():
                tensor.copy_(states[key])
        os.fdatasync(self._file.fileno())

    def has_moments(self, group: int) -> bool:
        """Return whether ``group`` has been updated."""
        return group in self._updated

    def file_bytes(self) -> int:
        """Return the file's present size on the disk, in bytes."""
        return os.fstat(self._file.fileno()).st_blocks * 512

    def ring_bytes(self) -> int:
        """Return the page-locked bytes of the host."""
        return self._ring.nbytes

    def _reserve(self, group: int, numel: int) -> None:
        """Reserve disk space for ``numel`` elements of ``group``; see [Note: Direct I/O]."""
        try:
            os.posix_fallocate(self._file.fileno(), self._starts[group] * _ELEMENT_BYTES, numel * _ELEMENT_BYTES)
        except OSError as error:
            raise TrainingError(
                f"no room for {numel * _ELEMENT_BYTES} bytes of optimizer state in offload_optimizer.nvme_path "
                f"({error}). All blocks' states together take {self.layout.total() * _ELEMENT_BYTES} bytes a rank. "
                "Make room, or name another path."
            ) from error

    # --------------------------------------------------------------------- transfers

    def _transfer(self, operation: str, parts: Sequence[tuple[Tensor, int]]) -> _Transfer:
        transfer = _Transfer(self._idle.pop() if self._idle else self._new_handle(), self._under_way, self._idle)
        for tensor, start in parts:
            transfer.issue(operation, tensor, self._path, start * _ELEMENT_BYTES)
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
