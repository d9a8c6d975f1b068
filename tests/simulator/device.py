"""The simulated accelerator as DeepSpeed's accelerator object, and torch's device module ``torch.sim``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import types
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from torch import Tensor

from ds_agsel.files import write_atomically
from simulator import collectives
from simulator.counters import Counts
from simulator.hazards import Detector, Report, Site
from simulator.operators import DEVICE, Operators
from simulator.queue import Queue


def load_backend() -> Any:
    """The compiled backend.cpp; built into TORCH_EXTENSIONS_DIR when it has changed (under a minute, idle).

    Each version has a folder of its own, with its source, so that checkouts that share builds do not undo each other's.
    """
    from torch.utils.cpp_extension import get_default_build_root, load

    source = Path(__file__).with_name("backend.cpp").read_bytes()
    name = f"ds_agsel_simulator_{hashlib.sha256(source).hexdigest()[:12]}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root(), name)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "backend.cpp"
    if not copy.exists():  # else ninja would find it changed
        write_atomically(copy, source.decode())
    return load(name, [str(copy)], extra_cflags=["-O0"], build_directory=str(folder))


class _Randomness:
    """The device's random state: a count of the seeds that random operators have been given."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def next_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))


class SimulatedAccelerator(DeepSpeedAccelerator):
    """Devices with memory of their own, real streams and late work. See `queue.py`. One a process: `simulated`."""

    def __init__(self) -> None:
        super().__init__()
        self._name = DEVICE
        self._communication_backend_name = collectives.NAME
        self._compile_backend = "eager"
        self.backend = load_backend()
        self.detector = Detector()
        self.queue = Queue(self.backend, self.detector)
        self.backend.set_queue(self.queue)
        self._randomness = _Randomness()
        torch.utils.rename_privateuse1_backend(DEVICE)
        torch._register_device_module(DEVICE, self._device_module())
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
        self.operators = Operators(self.backend, self.queue, self._randomness.next_seed)
        collectives.register(self)

    def configure(
        self,
        budget_bytes: int,
        seed: int,
        strict: bool,
        allowed: Callable[[Report], bool],
        without: Collection[Site],
        divides_as_cuda: bool,
    ) -> None:
        """Start afresh, on device 0, after what is queued has run.

        Args:
            seed: decides the order of all that may run in more than one.
            strict: a hazard raises where it is completed; else it is kept in ``detector.found``.
            allowed: which hazards are known faults of others (see `Detector`).
            without: drop the waits that these lines declare, to see that they are missed. ``queue.declared_waits``
                of an earlier run has the lines there are.
            divides_as_cuda: [Note: Division] in operators.py.
        """
        self.operators.divides_as_cuda = divides_as_cuda
        self.queue.reseed(seed, without)
        self.detector.strict, self.detector.allowed = strict, allowed
        self.detector.found.clear()
        self.detector.tolerated.clear()
        self.backend.set_budget(budget_bytes)
        self.backend.reset_peak()
        self.backend.set_device(0)
        self.backend.forget_order()
        self.manual_seed(seed)

    def _device_module(self) -> types.ModuleType:
        """``torch.sim``: what torch itself asks a device module for."""
        module = types.ModuleType(f"torch.{DEVICE}")
        module.is_available = lambda: True  # type: ignore[attr-defined]
        module.is_initialized = lambda: True  # type: ignore[attr-defined]
        module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
        module._lazy_init = lambda: None  # type: ignore[attr-defined]
        module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
        module.device = self._on_device  # type: ignore[attr-defined]
        for name in (
            "current_device", "set_device", "device_count", "synchronize", "current_stream", "default_stream", "stream",
            "Stream", "Event", "manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state", "memory_allocated",
            "max_memory_allocated", "reset_peak_memory_stats", "empty_cache",
        ):  # fmt: skip
            setattr(module, name, getattr(self, name))
        return module

    # ---------------------------------------------------------------- device

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return False  # host timers synchronize the device, which would hide missing waits

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return DEVICE if device_index is None else f"{DEVICE}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(DEVICE, self.current_device() if device_index is None else device_index)

    def set_device(self, device_index: int) -> None:
        index = torch.device(device_index).index if isinstance(device_index, (str, torch.device)) else device_index
        self.backend.set_device(int(index))
        self.backend.touch("set_device", int(index))

    def current_device(self) -> int:
        return self.backend.current_device()

    def current_device_name(self) -> str:
        return f"{DEVICE}:{self.current_device()}"

    def device_count(self) -> int:
        return self.backend.device_count()

    @contextlib.contextmanager
    def _on_device(self, index: Any = None) -> Iterator[None]:
        previous = self.current_device()
        if index is not None:
            self.backend.set_device(self.device(index).index if isinstance(index, int) else torch.device(index).index)
        try:
            yield
        finally:
            self.backend.set_device(previous)

    def order(self) -> list[tuple[str, int]]:
        """What touched which device since `configure`, each at its first time: "set_device", "tensor", "collective"."""
        return self.backend.order()

    def is_available(self) -> bool:
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        self.queue.synchronize()

    # ---------------------------------------------------------------- counts

    def counts(self) -> Counts:
        """What this process has asked of the device so far."""
        counts = self.queue.counts.copy()
        counts.device_allocations = self.backend.allocations()
        counts.pinned_allocations = self.backend.pinned_allocations()
        return counts

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """``with accelerator.counting() as counts:`` — at the end ``counts`` holds what was asked inside."""
        before, found = self.counts(), Counts()
        try:
            yield found
        finally:
            vars(found).update(vars(self.counts().since(before)))

    # ------------------------------------------------------------ randomness

    def random(self) -> Any:
        return torch.random

    def set_rng_state(self, new_state: Tensor, device_index: Any = None) -> None:
        self._randomness.generator.set_state(new_state)

    def get_rng_state(self, device_index: Any = None) -> Tensor:
        return self._randomness.generator.get_state()

    def manual_seed(self, seed: int) -> None:
        self._randomness.generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def initial_seed(self) -> int:
        return self._randomness.generator.initial_seed()

    def default_generator(self, device_index: int) -> torch.Generator:
        return self._randomness.generator

    # -------------------------------------------------------- streams, events

    @property
    def Stream(self) -> Any:
        return partial(torch.Stream, device=self.device())

    @property
    def Event(self) -> Any:
        return partial(torch.Event, device=self.device())

    @contextlib.contextmanager
    def stream(self, stream: torch.Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        previous = self.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(previous)

    def current_stream(self, device_index: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream()

    def default_stream(self, device_index: Any = None) -> torch.Stream:
        index = self.current_device()  # whose default stream has that id
        return torch.Stream(stream_id=index, device_index=index, device_type=self._device_type())

    def _device_type(self) -> int:
        return self.current_stream().device_type

    # ----------------------------------------------------------------- memory

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self, device_index: Any = None) -> int:
        return self.backend.allocated_bytes()

    def max_memory_allocated(self, device_index: Any = None) -> int:
        return self.backend.peak_bytes()

    def reset_max_memory_allocated(self, device_index: Any = None) -> None:
        self.backend.reset_peak()

    def reset_peak_memory_stats(self, device_index: Any = None) -> None:
        self.backend.reset_peak()

    memory_cached = memory_reserved = memory_allocated
    max_memory_cached = max_memory_reserved = max_memory_allocated
    reset_max_memory_cached = reset_max_memory_allocated

    def memory_stats(self, device_index: Any = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def total_memory(self, device_index: Any = None) -> int:
        return self.backend.budget()

    def available_memory(self, device_index: Any = None) -> int:
        return self.backend.budget() - self.backend.active_bytes()

    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory held now."""
        return self.backend.pinned_bytes()

    def pinned_taken_bytes(self) -> int:
        """Bytes of page-locked memory that torch's caching host allocator would have taken by now.

        It rounds each request up to a power of two, and keeps what is freed for later requests of that size.
        """
        return self.backend.pinned_taken_bytes()

    def empty_pinned_cache(self) -> None:
        """Give page-locked memory that was freed back, as `torch._C._host_emptyCache` does."""
        self.backend.empty_pinned_cache()

    # ------------------------------------------------------------------ dtypes

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    def _constructor(self, dtype: torch.dtype) -> Any:
        return partial(torch.tensor, dtype=dtype, device=self.device())

    BFloat16Tensor = property(lambda self: self._constructor(torch.bfloat16))
    ByteTensor = property(lambda self: self._constructor(torch.uint8))
    DoubleTensor = property(lambda self: self._constructor(torch.float64))
    FloatTensor = property(lambda self: self._constructor(torch.float32))
    HalfTensor = property(lambda self: self._constructor(torch.float16))
    IntTensor = property(lambda self: self._constructor(torch.int32))
    LongTensor = property(lambda self: self._constructor(torch.int64))

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == DEVICE

    # ---------------------------------------------------------------- the rest

    def range_push(self, msg: str, domain: Any = None, category: Any = None) -> None:
        pass

    def range_pop(self, domain: Any = None) -> None:
        pass

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    def communication_backend_name(self) -> str:
        return self._communication_backend_name

    def is_triton_supported(self) -> bool:
        return False

    def create_graph(self) -> None:
        return None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        return contextlib.nullcontext()

    def replay_graph(self, graph: Any) -> None:
        pass

    def op_builder_dir(self) -> str:
        return "deepspeed.ops.op_builder.cpu"

    def create_op_builder(self, class_name: str) -> Any:
        return self.get_op_builder(class_name)()

    def get_op_builder(self, class_name: str) -> Any:
        """The host's optimizers; there are no kernels of DeepSpeed's for the device."""
        from deepspeed.ops.op_builder import cpu

        host = {"CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder", "AsyncIOBuilder", "PinMemoryBuilder"}
        return getattr(cpu, class_name) if class_name in host else cpu.NotImplementedBuilder

    def build_extension(self) -> Any:
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension

    def export_envs(self) -> list[str]:
        return []

    def visible_devices_envs(self) -> list[str]:
        return ["SIM_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def get_compile_backend(self) -> str:
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        self._compile_backend = backend
