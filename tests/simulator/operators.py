"""Every aten operator on device tensors: queued on the current stream, run later by the CPU's kernel.

What an operator returns must be there at once, so its sizes come from a run on meta tensors. Where they depend on
data, or the host is given a number, the call waits for its stream, as on CUDA.

[Note: Copies] As torch's CUDA copy does it: host to device is asynchronous from pinned memory of the same dtype and
layout, and otherwise takes the host's bytes before it returns; device to host is asynchronous only into contiguous
pinned memory; whatever is not ``non_blocking`` waits for its stream.

[Note: Division] CUDA divides by a number of the host by multiplying with its reciprocal (`div_true_kernel_cuda`), which
may be off by a bit from the host's division. Asked to, `Operators.divides_as_cuda`, the kernels here do, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch._meta_registrations
from torch import Tensor

from simulator.hazards import Access
from simulator.queue import Queue

DEVICE = "sim"

_MULTIPLIES = {
    torch.ops.aten.div.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.div_.Tensor: torch.ops.aten.mul_.Tensor,
    torch.ops.aten.div.out: torch.ops.aten.mul.out,
}
# Their host operands may be indices or values of any size; CUDA moves them to the device, and so waits.
TAKE_HOST_OPERANDS = ("aten::index", "aten::_index_put_impl_", "aten::index_put", "aten::index_put_")


class _Plan(NamedTuple):
    """What the schema says of an operator."""

    written_positions: frozenset[int]
    written_names: frozenset[str]
    returned: tuple[int | str | None, ...]  # the argument that is returned, or None for something new
    returns_tensors: bool
    is_random: bool


class _Unpredictable(Exception):
    """The sizes of a result depend on data, or nobody wrote down how to find them."""


@cache
def _plan(op: torch._ops.OpOverload) -> _Plan:
    schema = op._schema
    positions, names = set(), set()
    owner: dict[str, int | str] = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            key = argument.name if argument.kwarg_only else position
            for symbol in argument.alias_info.before_set:
                owner[symbol] = key
            if argument.alias_info.is_write:
                positions.add(position)
                names.add(argument.name)
    returned: list[int | str | None] = []
    for result in schema.returns:
        if result.alias_info is not None and not result.alias_info.is_write:
            raise NotImplementedError(f"the simulated accelerator has no view operator {op}")
        returned.append(owner[next(iter(result.alias_info.before_set))] if result.alias_info is not None else None)
    kinds = [str(result.type) for result in schema.returns]
    return _Plan(
        frozenset(positions),
        frozenset(names),
        tuple(returned),
        all(kind in ("Tensor", "Tensor?", "List[Tensor]") for kind in kinds),
        torch.Tag.nondeterministic_seeded in op.tags,
    )


def _kernels_hidden_by_composites() -> Iterator[tuple[str, torch._ops.OpOverload]]:
    """Operators with a kernel for the CPU and a composite one, which would come before the fallback."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        composite = any(has_kernel(name, f"Composite{kind}Autograd") for kind in ("Implicit", "Explicit"))
        ours = has_kernel(name, "PrivateUse1")
        if name.startswith("aten::") and composite and has_kernel(name, "CPU") and not ours:
            base, _, overload = name.removeprefix("aten::").partition(".")
            yield name, getattr(getattr(torch.ops.aten, base), overload or "default")


def _as_tensor(op: torch._ops.OpOverload, position: int, value: Any) -> Any:
    """Return a number that a composite operator has put in a tensor's place, as `bitwise_and_.Scalar` does, as one."""
    if isinstance(value, (bool, int, float)) and str(op._schema.arguments[position].type) == "Tensor":
        return torch.tensor(value)
    return value


class Operators:
    """The kernels of the device type, over ``queue``. ``next_seed`` is asked at the call of a random operator."""

    def __init__(self, backend: Any, queue: Queue, next_seed: Callable[[], int]) -> None:
        self._backend = backend
        self._queue = queue
        self._next_seed = next_seed
        self.divides_as_cuda = False  # [Note: Division]
        self._predictions: dict[Any, Any] = {}
        self._library = torch.library.Library("_", "IMPL")
        self._library.fallback(self._call, "PrivateUse1")
        self._aten = torch.library.Library("aten", "IMPL")
        self._aten.impl("_copy_from", self._copy_from, "PrivateUse1")
        self._aten.impl("_copy_from_and_resize", self._copy_from, "PrivateUse1")
        for name, op in _kernels_hidden_by_composites():
            self._aten.impl(name, partial(self._call, op), "PrivateUse1")

    # ---------------------------------------------------------- any operator

    def _call(self, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
        plan = _plan(op)
        accesses: list[Access] = []
        indices: set[int] = set()
        moves = op._schema.name in TAKE_HOST_OPERANDS

        def lower(value: Any, writes: bool) -> Any:
            if isinstance(value, Tensor):
                if value.device.type == DEVICE:
                    indices.add(value.device.index)
                    alias, block, first, last = self._backend.lower(value)
                    accesses.append(Access(block, first, last, writes))
                    return alias
                if value.dim() == 0 and not writes:
                    return self._backend.snapshot(value)
                if moves and not writes:
                    return lower(value.to(DEVICE), False)
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE}:0 and "
                    f"{value.device}! ({op._schema.name})"
                )
            if isinstance(value, (list, tuple)):
                return type(value)(lower(item, writes) for item in value)
            if isinstance(value, torch.device) and value.type == DEVICE:
                indices.add(self._backend.current_device() if value.index is None else value.index)
                return torch.device("cpu")
            if isinstance(value, torch.Generator):
                return None
            return value

        self._size_empty_outputs(op, plan, args, kwargs)
        args = tuple(_as_tensor(op, position, value) for position, value in enumerate(args))
        if self.divides_as_cuda and op in _MULTIPLIES and args[1].device.type == "cpu" and args[0].is_floating_point():
            of_kernel = torch.float64 if args[0].dtype is torch.float64 else torch.float32
            op, args = _MULTIPLIES[op], (args[0], args[1].to(of_kernel).reciprocal())
        lowered = [lower(value, position in plan.written_positions) for position, value in enumerate(args)]
        named = {name: lower(value, name in plan.written_names) for name, value in kwargs.items()}
        if len(indices) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(f'{DEVICE}:{index}' for index in sorted(indices))}! ({op._schema.name})"
            )
        device = torch.device(DEVICE, indices.pop() if indices else self._backend.current_device())
        stream = self._queue.current(device.index)
        kernel = self._seeded(op) if plan.is_random else op
        if not plan.returns_tensors:
            return self._run_for_host(op, kernel, lowered, named, accesses, stream)
        if all(key is not None for key in plan.returned):
            self._queue.submit(str(op), lambda: kernel(*lowered, **named), accesses, stream)
            results = [args[key] if isinstance(key, int) else kwargs[key or ""] for key in plan.returned]
            return results[0] if len(results) == 1 else tuple(results) if results else None
        try:
            predicted = self._predict(op, lowered, named)
        except _Unpredictable:
            found = self._run_for_host(op, kernel, lowered, named, accesses, stream)
            return _map(lambda result: result.to(device, non_blocking=True), found)
        outputs: list[Tensor] = []

        def make(meta: Tensor) -> Tensor:
            made = torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=device)
            alias, block, first, last = self._backend.lower(made)
            accesses.append(Access(block, first, last, True))
            outputs.append(alias)
            return made

        made = _map(make, predicted)

        def run() -> None:
            produced: list[Tensor] = []
            _map(produced.append, kernel(*lowered, **named))
            for output, result in zip(outputs, produced, strict=True):
                output.copy_(result)

        self._queue.submit(str(op), run, accesses, stream)
        if any(key is not None for key in plan.returned):
            raise NotImplementedError(f"{op} returns both an argument and a new tensor")
        return made

    def _size_empty_outputs(self, op: Any, plan: _Plan, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Resize ``out=`` tensors that were made empty for the operator to size."""
        outputs = [kwargs[key] for key in plan.returned if isinstance(key, str)]
        if len(outputs) == len(plan.returned) and any(output.numel() == 0 for output in outputs):
            predicted = self._predict(op, args, kwargs)
            for output, meta in zip(outputs, predicted if len(outputs) > 1 else [predicted], strict=True):
                output.resize_(meta.size())

    def _run_for_host(
        self,
        op: Any,
        kernel: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        accesses: Sequence[Access],
        stream: int,
    ) -> Any:
        """The result itself, after everything queued before on this stream."""
        result: list[Any] = []
        self._queue.submit(str(op), lambda: result.append(kernel(*args, **kwargs)), accesses, stream)
        self._queue.wait_for(stream, str(op))
        return result[0]

    def _seeded(self, op: Any) -> Callable[..., Any]:
        """``op`` with its random numbers decided now, whenever it runs."""
        seed = self._next_seed()

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.random.fork_rng(devices=[], device_type="cpu"):
                torch.default_generator.manual_seed(seed)
                return op(*args, **kwargs)

        return run

    def _predict(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """``op``'s results as meta tensors; raises `_Unpredictable`."""
        key = (op, _key(args), tuple((name, _key(value)) for name, value in kwargs.items()))
        if key not in self._predictions:
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    self._predictions[key] = op(*_map(_to_meta, args), **_map(_to_meta, kwargs))
            except (NotImplementedError, RuntimeError):
                self._predictions[key] = None
        if self._predictions[key] is None:
            raise _Unpredictable
        return self._predictions[key]

    # ------------------------------------------------------------------ copies

    def _copy_from(self, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """[Note: Copies]."""
        if source.device.type == target.device.type == DEVICE:
            source_alias, *read = self._backend.lower(source)
            target_alias, *written = self._backend.lower(target)
            self._queue.submit(
                "copy D2D",
                lambda: target_alias.copy_(source_alias),
                [Access._make((*read, False)), Access._make((*written, True))],
                self._queue.current(source.device.index),
            )
        elif target.device.type == DEVICE:
            self._copy_to_device(source, target, non_blocking)
        else:
            self._copy_to_host(source, target, non_blocking)
        return target

    def _copy_to_device(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        block, first, last = self._backend.pinned_extent(source)
        direct = block != 0 and source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
        alias, *written = self._backend.lower(target)
        accesses = [Access._make((*written, True))]
        if direct:
            accesses.append(Access(block, first, last, False))
            taken = source.detach()
        else:
            taken = source.detach().to(target.dtype).clone()
        stream = self._queue.current(target.device.index)
        self._queue.submit("copy H2D", lambda: alias.copy_(taken), accesses, stream)
        if not non_blocking:
            self._queue.wait_for(stream, "copy H2D")

    def _copy_to_host(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.dtype != target.dtype:
            source = source.to(target.dtype)
        if not source.is_contiguous():
            source = source.contiguous()
        alias, *read = self._backend.lower(source)
        accesses = [Access._make((*read, False))]
        block, first, last = self._backend.pinned_extent(target)
        if block != 0:
            accesses.append(Access(block, first, last, True))
        destination = target.detach()
        stream = self._queue.current(source.device.index)
        self._queue.submit("copy D2H", lambda: destination.copy_(alias), accesses, stream)
        if not (non_blocking and block != 0 and target.is_contiguous()):
            self._queue.wait_for(stream, "copy D2H")


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    return value


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor.to("meta")
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.size()), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    return type(value), value
