"""Collectives between simulated devices, with NCCL's ordering: a side stream of their own, a wait that is no host wait.

A collective is queued on the communication stream after what the calling stream has queued so far, and runs there
over gloo when its turn comes. The first collective of a group meets NCCL's check that no two ranks of a host use one
device. ``Work.wait`` lets the calling stream wait for it, not the host; only `barrier` does
both. All groups of a process share one stream, so that ranks always meet in the order of their calls. A rank that
returns from a test must have called `synchronize`, or others may wait for it for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simulator.hazards import Access
from simulator.operators import DEVICE

NAME = "simccl"


class _Work(dist.Work):
    """A collective on its way."""

    def __init__(self, event: torch.Event, result: list[Tensor]) -> None:
        super().__init__()
        self._event = event
        self._result = result

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._event.wait(torch.accelerator.current_stream())
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        return self._event.query()

    def result(self) -> list[Tensor]:
        return self._result


class SimulatedGroup(dist.ProcessGroup):
    """A process group for device tensors; as with NCCL, host tensors are refused."""

    def __init__(self, accelerator: Any, streams: Sequence[torch.Stream], gloo: dist.ProcessGroupGloo) -> None:
        super().__init__(gloo.rank(), gloo.size())
        self._accelerator = accelerator
        self._streams = streams
        self._gloo = gloo
        self._known_devices: set[int] = set()

    @property
    def _device_types(self) -> list[torch.device]:
        """Where torch puts objects that are gathered, as a group of NCCL alone says cuda."""
        return [torch.device(DEVICE)]

    def getBackendName(self) -> str:
        return NAME

    def _queue(self, name: str, read: Any, written: Any, collective: Callable[[Any, Any], dist.Work]) -> _Work:
        """Queue ``collective(read, written)``, which gets host tensors over the same bytes, nested alike."""
        accesses: list[Access] = []
        device = _device_of((read, written), self._accelerator.current_device())
        stream = self._streams[device]
        self._meet(device)

        def lower(value: Any, writes: bool) -> Any:
            if isinstance(value, Tensor):
                if value.device.type != DEVICE:
                    raise RuntimeError(f"No backend type associated with device type {value.device.type} ({name})")
                value.record_stream(stream)
                alias, block, first, last = self._accelerator.backend.lower(value)
                accesses.append(Access(block, first, last, writes))
                return alias
            return [lower(item, writes) for item in value]

        lowered = lower(read, False), lower(written, True)
        queue = self._accelerator.queue
        called = queue.new_event()
        queue.record(called, queue.current(device))
        queue.follow(called, stream.stream_id)
        queue.submit(name, lambda: collective(*lowered).wait(), accesses, stream.stream_id)
        event = torch.Event(device=torch.device(DEVICE, device))
        event.record(stream)
        return _Work(event, written)

    def _meet(self, device: int) -> None:
        """Raise RuntimeError if another rank of the group is on ``device`` too; asked once for each device.

        All ranks run on one host.
        """
        self._accelerator.backend.touch("collective", device)
        if device in self._known_devices or self.size() == 1:
            return
        self._known_devices.add(device)
        # In the order of the collectives that are queued: they run over the same gloo group.
        self._accelerator.queue.finish_stream(self._streams[device].stream_id)
        devices = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size())]
        self._gloo.allgather([devices], [torch.tensor([device])]).wait()
        shared = [rank for rank, other in enumerate(devices) if int(other) == device]
        if len(shared) > 1:
            raise RuntimeError(f"Duplicate GPU detected: ranks {shared} of a group are all on {DEVICE}:{device}")

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        opts = opts or dist.AllreduceOptions()
        return self._queue("allreduce", [], tensors, lambda _, written: self._gloo.allreduce(written, opts))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        return [self.allreduce([tensor], opts) for tensor in tensors][-1]

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        opts = opts or dist.BroadcastOptions()
        return self._queue("broadcast", [], tensors, lambda _, written: self._gloo.broadcast(written, opts))

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        opts = opts or dist.ReduceOptions()
        return self._queue("reduce", [], tensors, lambda _, written: self._gloo.reduce(written, opts))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        return self._queue("allgather", inputs, outputs, lambda read, written: self._gloo.allgather(written, read))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> _Work:
        return self._queue(
            "all_gather_into_tensor",
            input,
            output,
            lambda read, written: self._gloo.allgather([list(written.view(-1).chunk(self.size()))], [read.view(-1)]),
        )

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> _Work:
        return [self.all_gather_single(*pair, opts) for pair in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Work:
        return self._reduce_scatter(outputs[0], inputs[0], opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> _Work:
        return self._reduce_scatter(output, list(input.view(-1).chunk(self.size())), opts)

    def _reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], opts: Any) -> _Work:
        """By an all-reduce: gloo has no reduce-scatter for every type."""
        options = dist.AllreduceOptions()
        options.reduceOp = (opts or dist.ReduceScatterOptions()).reduceOp

        def collective(read: list[Tensor], written: Tensor) -> dist.Work:
            pieces = [piece.reshape(-1) for piece in read]
            total = torch.cat(pieces)
            self._gloo.allreduce([total], options).wait()
            written.copy_(total.split([len(piece) for piece in pieces])[self.rank()].view_as(written))
            return _Done()

        return self._queue("reduce_scatter", list(inputs), output, collective)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        return self._queue("gather", inputs, outputs, lambda read, written: self._gloo.gather(written, read, opts))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Work:
        return self._queue("scatter", inputs, outputs, lambda read, written: self._gloo.scatter(written, read, opts))

    def barrier(self, opts: Any = None) -> _Work:
        work = self._queue("barrier", [], [], lambda *_: self._gloo.barrier())
        queue = self._accelerator.queue
        queue.wait_for(self._streams[self._accelerator.current_device()].stream_id, "barrier")
        return work

    # What torch calls the same before 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single


def _device_of(value: Any, current: int) -> int:
    """The index of the device of the first tensor in a nest; ``current`` without one."""
    if isinstance(value, Tensor):
        return current if value.device.index is None else value.device.index
    for item in value:
        found = _device_of(item, -1)
        if found >= 0:
            return found
    return current


class _Done:
    def wait(self) -> bool:
        return True


def register(accelerator: Any) -> None:
    """Make ``simccl`` known to torch.distributed, for the tensors of ``accelerator``."""
    streams = [torch.Stream(device=torch.device(DEVICE, index)) for index in range(accelerator.device_count())]

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> SimulatedGroup:
        # Ranks meet on the host while groups are made: none may wait in a queued collective then.
        accelerator.queue.finish()
        return SimulatedGroup(accelerator, streams, dist.ProcessGroupGloo(store, rank, size, timeout))

    dist.Backend.register_backend(NAME, create, devices=[DEVICE])
