"""Streams, events and an adversarial scheduler: queued work runs late, in an order that the declared waits allow.

[Note: Late and in any order] A call on a device tensor only puts an operation at the end of its stream's queue.
Operations run when the host asks for something that needs them (`item`, a blocking copy, `synchronize`), and then
in a seeded order: of one stream first in, first out; between streams only the declared waits count. One seed may
run nothing but what is needed, another whole queues of other streams first, another a little at every call, so
that what is ordered by luck alone comes out in both orders over a few seeds.

[Note: What synchronizes the host] As on CUDA: `Stream.synchronize`, `Event.synchronize`, an `Event.query` that says
yes, `synchronize`, and the operations whose result the host sees. Nothing else; a host tensor that a queued copy
still has to write has its old bytes.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from simulator.counters import Cause, Counts
from simulator.hazards import Access, Clock, Detector, Hazard, Site, call_site


@dataclass(eq=False)
class Event:
    """A point in a stream: what was queued there when it was last recorded. Made by `Queue.new_event`."""

    stream: int | None = None
    position: int = 0
    clock: Clock | None = None


@dataclass(eq=False)
class _Operation:
    name: str
    run: Callable[[], object]


@dataclass(eq=False)
class _Wait:
    stream: int
    position: int


class _Stream:
    def __init__(self) -> None:
        self.items: deque[_Operation | _Wait] = deque()
        self.queued = 0
        self.done = 0


class Queue:
    """All streams of the device, and the host's place among them. One a process; any thread may call."""

    def __init__(self, backend: Any, detector: Detector) -> None:
        self._backend = backend
        self.detector = detector
        self.lock = threading.RLock()
        self.counts = Counts()
        self._streams: dict[int, _Stream] = {}
        self._freed: dict[int, list[tuple[int, int, torch.Tensor]]] = {}
        self._running = False
        self.reseed(0)

    def reseed(self, seed: int, left_out: Collection[Site] = ()) -> None:
        """Let ``seed`` decide all orders from here on, and drop the waits that the lines ``left_out`` declare."""
        self.finish()
        self.declared_waits: set[Site] = set()
        self.left_out = left_out
        self._random = random.Random(seed)
        self._eagerness = self._random.choice([0.0, 0.0, 0.05, 0.5])

    # ------------------------------------------------------------------ put in

    def submit(
        self, name: str, run: Callable[[], object], accesses: Sequence[Access], stream: int | None = None
    ) -> None:
        """Queue ``run`` on ``stream`` (default: the calling thread's current one)."""
        with self.lock:
            stream = self.current() if stream is None else stream
            self._take_freed()
            self._reuse(stream)
            site = call_site()
            self.counts.operations[Cause(name, site)] += 1
            self.detector.submit(stream, name, accesses, site)
            self._append(stream, _Operation(name, run))
            if self._eagerness and not self._running and self._random.random() < self._eagerness:
                self._run_one()

    def current(self, device: int | None = None) -> int:
        """Id of the calling thread's current stream on ``device`` (None: its current one)."""
        return self._backend.current_stream(self._backend.current_device() if device is None else device)

    def _append(self, stream: int, item: _Operation | _Wait) -> None:
        target = self._streams.setdefault(stream, _Stream())
        target.items.append(item)
        target.queued += 1

    def _take_freed(self) -> None:
        """Take the blocks freed since; see [Note: Freed blocks] in backend.cpp."""
        if self._backend.any_freed():
            for block, size, stream, recorded, data in self._backend.take_freed():
                if recorded:
                    self._recycle_after(block, recorded)
                else:
                    self._freed.setdefault(stream, []).append((block, size, data))

    def _reuse(self, stream: int) -> None:
        """Let another tensor's bytes come into ``stream``'s freed blocks: the caching allocator may give them to what
        is queued there next, so that all other streams' uses of them must be ordered before that."""
        hazard = None
        for block, size, data in self._freed.pop(stream, ()):
            try:
                self.detector.submit(stream, "reuse after free", [Access(block, 0, size, True)], call_site())
            except Hazard as error:
                hazard = error
            self._append(stream, _Operation("reuse after free", partial(data.fill_, 0xFF)))
            self._backend.recycle(block)
        if hazard is not None:
            raise hazard

    def _recycle_after(self, block: int, streams: Sequence[int]) -> None:
        """Give ``block`` back once what is queued now on each of ``streams`` has run, as `record_stream` asks."""
        left = set(streams)

        def passed(stream: int) -> None:
            left.discard(stream)
            if not left:
                self.detector.forget(block)
                self._backend.recycle(block)

        for stream in streams:
            self._append(stream, _Operation("recorded stream passed", partial(passed, stream)))

    # ------------------------------------------------------------------ events

    def new_event(self) -> Event:
        return Event()

    def record(self, event: Event, stream: int) -> None:
        with self.lock:
            self._take_freed()
            event.stream = stream
            event.position = self._streams.setdefault(stream, _Stream()).queued
            event.clock = self.detector.clock_of(stream)

    def wait(self, event: Event, stream: int) -> None:
        """Let what is queued on ``stream`` from now on run after ``event``; nothing if it was never recorded."""
        if self._is_declared():
            self.follow(event, stream)

    def follow(self, event: Event, stream: int) -> None:
        """`wait`, for the simulator's own use: not one of ``declared_waits``."""
        with self.lock:
            self._take_freed()
            if event.stream is None or event.clock is None:
                return
            self.detector.join(stream, event.clock)
            if event.stream != stream:
                self._append(stream, _Wait(event.stream, event.position))

    def query_event(self, event: Event) -> bool:
        """Whether the event has passed; work that may or may not have run by now runs, or not, as the seed has it."""
        with self.lock:
            if event.stream is None or event.clock is None:
                return True
            if not self._passed(event.stream, event.position) and self._random.random() < 0.5:
                return False
            self._finish(event)
            return True

    def synchronize_event(self, event: Event) -> None:
        if self._is_declared("synchronize event"):
            self._finish(event)

    def _is_declared(self, host_waits_in: str | None = None) -> bool:
        """Note who declares a wait, and count it if the host waits; False where this one is to be left out."""
        site = call_site()
        if host_waits_in is not None:
            self.counts.waits[Cause(host_waits_in, site)] += 1
        self.declared_waits.add(site)
        return site not in self.left_out

    # ------------------------------------------------------------- host waits

    def query_stream(self, stream: int) -> bool:
        event = self.new_event()
        self.record(event, stream)
        return self.query_event(event)

    def synchronize_stream(self, stream: int) -> None:
        if self._is_declared("synchronize stream"):
            self.finish_stream(stream)

    def synchronize(self) -> None:
        if self._is_declared("synchronize"):
            self.finish()

    def finish(self) -> None:
        """Run all that is queued, while the host waits."""
        with self.lock:
            self._take_freed()
            for stream in list(self._streams):
                self.finish_stream(stream)
            for stream in list(self._freed):
                self._reuse(stream)

    def wait_for(self, stream: int, name: str) -> None:
        """Let the host wait for ``stream``, as ``name`` does, which was queued there last."""
        self.counts.waits[Cause(name, call_site())] += 1
        self.finish_stream(stream)

    def finish_stream(self, stream: int) -> None:
        """Run all that is queued on ``stream``, while the host waits."""
        event = self.new_event()
        self.record(event, stream)
        self._finish(event)

    def _finish(self, event: Event) -> None:
        with self.lock:
            self._take_freed()
            if event.stream is not None and event.clock is not None:
                self._drain(event.stream, event.position)
                self.detector.join_host(event.clock)

    def on_memory_pressure(self) -> None:
        """Run all that is queued, so that blocks held for recorded streams come back. The host learns nothing."""
        with self.lock:
            self._take_freed()
            for stream in list(self._streams):
                self._drain(stream, self._streams[stream].queued)

    def pending(self) -> int:
        """Operations queued and not yet run."""
        return sum(
            isinstance(item, _Operation) and item.name != "reuse after free"
            for stream in self._streams.values()
            for item in stream.items
        )

    # --------------------------------------------------------------- scheduler

    def _passed(self, stream: int, position: int) -> bool:
        return self._streams[stream].done >= position

    def _drain(self, stream: int, position: int) -> None:
        """Run until ``stream`` has passed ``position``; see [Note: Late and in any order]."""
        if self._passed(stream, position):
            return
        if self._running:
            raise RuntimeError("an operation of the simulated accelerator waited for the accelerator while it ran")
        manner = self._random.choice(["needed", "needed", "any", "favourite"])
        favour = {name: self._random.random() for name in self._streams}
        while not self._passed(stream, position):
            if manner == "needed":
                self._run_head(self._needed(stream))
                continue
            ready = list(self._ready())
            if manner == "any":
                self._run_head(self._random.choice(ready))
            else:
                self._run_head(max(ready, key=favour.__getitem__))

    def _ready(self) -> Iterator[int]:
        for name, stream in self._streams.items():
            if stream.items and not self._blocked(stream.items[0]):
                yield name

    def _blocked(self, item: _Operation | _Wait) -> bool:
        return isinstance(item, _Wait) and not self._passed(item.stream, item.position)

    def _needed(self, stream: int) -> int:
        """The stream whose head must run next for ``stream`` to go on."""
        item = self._streams[stream].items[0]
        while isinstance(item, _Wait) and not self._passed(item.stream, item.position):
            stream = item.stream
            item = self._streams[stream].items[0]
        return stream

    def _run_one(self) -> None:
        ready = list(self._ready())
        if ready:
            self._run_head(self._random.choice(ready))

    def _run_head(self, name: int) -> None:
        stream = self._streams[name]
        item = stream.items.popleft()
        stream.done += 1
        if isinstance(item, _Operation):
            with self._on_the_device():
                item.run()

    @contextmanager
    def _on_the_device(self) -> Iterator[None]:
        """Kernels see no autograd, no autocast and no default device of the thread that happens to run them."""
        self._running = True
        try:
            with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction():
                yield
        finally:
            self._running = False
