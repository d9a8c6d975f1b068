"""The forms that Adam's moments can rest in, between the updates of their group."""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_agsel.errors import CheckpointError, ConfigError
from ds_agsel.residency.rooms import BLOCK_NUMEL, codes_name, largest_name, moment_rooms
from ds_agsel.residency.states import MOMENTS

LOWBIT_REMEDY = "Install it: pip install 'ds-agsel[lowbit]'"
_PIECE_NUMEL = 2**22


class MomentForm(ABC):
    """How a moment, fp32, (numel,), is kept in fewer bytes. A moment's form is one or more tensors by name."""

    name: ClassVar[str]
    is_random: ClassVar[bool] = False
    """Whether `pack` with a generator rounds stochastically."""

    @classmethod
    def rooms(cls, numel: int) -> dict[str, tuple[int, torch.dtype]]:
        """Return the tensors that both moments of ``numel`` elements take: name -> (elements, dtype)."""
        return moment_rooms(cls.name, numel)

    @abstractmethod
    def pack(self, key: str, values: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return moment ``key`` of ``values`` in this form: new tensors on the same device.

        With ``generator`` rounding is stochastic where the form rounds so; without, to the nearest.
        """

    def pack_again(self, key: str, values: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `pack`, of ``values`` that are partly what `unpack` made of ``before``: those keep the bits they had."""
        return self.pack(key, values)

    @abstractmethod
    def unpack(self, key: str, packed: Mapping[str, Tensor], out: Tensor) -> None:
        """Write moment ``key`` of ``packed`` to ``out``, fp32, (numel,)."""

    @classmethod
    def found(cls, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors of both moments in a loaded Adam state; None if they are not in this form."""
        rooms = cls.rooms(0)
        if any(name not in state or state[name].dtype != dtype for name, (_, dtype) in rooms.items()):
            return None
        return {name: state[name] for name in rooms}


class Fp32Moments(MomentForm):
    """As they are: where master weights alone rest in another form."""

    name = "fp32"

    def pack(self, key: str, values: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {key: values.clone()}

    def unpack(self, key: str, packed: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(packed[key])


class Bf16Moments(MomentForm):
    """bfloat16 with stochastic rounding: 2 bytes an element. What `unpack` gave packs to the same bits.

    With β2 = 0.999 an update moves ``exp_avg_sq`` by less than half a unit in bfloat16's last place: rounded to the
    nearest it would stand still. Rounded up or down at random, in proportion, it is right on average.
    """

    name = "bf16"
    is_random = True

    def pack(self, key: str, values: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {key: values.to(torch.bfloat16) if generator is None else rounded_stochastically(values, generator)}

    def unpack(self, key: str, packed: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(packed[key])


class Int8Moments(MomentForm):
    """Block-wise dynamic 8-bit quantization as in 8-bit Adam (arXiv:2110.02861), by bitsandbytes.

    1 byte an element and 4 for each `BLOCK_NUMEL` of them, the largest absolute value. To the nearest of 256 values,
    signed for ``exp_avg``. On a processor bitsandbytes (0.50.2) finds it by a table with steps of 2**-16 of the block's
    largest value: what is smaller would all become 1.5e-5 or 2.1e-5 of it. Zeros stay zeros here, so that what has no
    gradient (padding, tokens that do not occur) is not moved. The names are not those of moments, so that a tool that
    looks for fp32 moments finds none, instead of taking codes for numbers.

    What `unpack` gave can pack to other bits: no code is −1, so that a block whose largest value is negative shrinks.
    Raises ImportError where bitsandbytes can't be imported.
    """

    name = "int8"

    def __init__(self) -> None:
        # It warns of kernels for matrix products, which are not used here.
        library_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
        level = library_logger.level
        library_logger.setLevel(logging.ERROR)
        try:
            self._library: Any = importlib.import_module("bitsandbytes.functional")
        finally:
            library_logger.setLevel(level)
        self._values = {key: self._library.create_dynamic_map(signed=key == "exp_avg") for key in MOMENTS}
        self._zeros = {key: int((values == 0).nonzero()[0]) for key, values in self._values.items()}

    def pack(self, key: str, values: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        values = values.detach()
        codes, state = self._library.quantize_blockwise(values, code=self._table(key, values), blocksize=BLOCK_NUMEL)
        for piece, zeros in zip(codes.split(_PIECE_NUMEL), values.split(_PIECE_NUMEL), strict=True):
            piece.masked_fill_(zeros == 0, self._zeros[key])
        return {codes_name(key): codes, largest_name(key): state.absmax}

    def pack_again(self, key: str, values: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed = self.pack(key, values)
        for piece, old in self._unpacked(key, before):
            differs = values[piece] != old
            padding = -differs.numel() % BLOCK_NUMEL
            kept = ~torch.nn.functional.pad(differs, (0, padding)).view(-1, BLOCK_NUMEL).any(1)
            blocks = slice(piece.start // BLOCK_NUMEL, piece.start // BLOCK_NUMEL + kept.numel())
            codes, largest = packed[codes_name(key)][piece], packed[largest_name(key)][blocks]
            largest.copy_(torch.where(kept, before[largest_name(key)][blocks], largest))
            each = kept.repeat_interleave(BLOCK_NUMEL)[: codes.numel()]
            codes.copy_(torch.where(each, before[codes_name(key)][piece], codes))
        return packed

    def unpack(self, key: str, packed: Mapping[str, Tensor], out: Tensor) -> None:
        for piece, values in self._unpacked(key, packed):
            out[piece] = values

    def _unpacked(self, key: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which elements, their values in fp32) in pieces, for the library makes a new tensor of each."""
        codes, largest = packed[codes_name(key)], packed[largest_name(key)]
        table = self._table(key, codes)
        for start in range(0, codes.numel(), _PIECE_NUMEL):
            piece = slice(start, min(start + _PIECE_NUMEL, codes.numel()))
            blocks = largest[start // BLOCK_NUMEL : -(-piece.stop // BLOCK_NUMEL)]
            yield (
                piece,
                self._library.dequantize_blockwise(codes[piece], absmax=blocks, code=table, blocksize=BLOCK_NUMEL),
            )

    def _table(self, key: str, like: Tensor) -> Tensor:
        if self._values[key].device != like.device:
            self._values[key] = self._values[key].to(like.device)
        return self._values[key]


FORMS: dict[str, type[MomentForm]] = {form.name: form for form in (Fp32Moments, Bf16Moments, Int8Moments)}


def new_form(name: str) -> MomentForm:
    """Return the form ``name`` of ``state_dtype``. Raises ConfigError where its library can't be imported."""
    try:
        return FORMS[name]()
    except ImportError as error:
        raise ConfigError(
            f"adagrad_select.state_dtype={name!r} needs bitsandbytes, which can't be imported ({error}). "
            f"{LOWBIT_REMEDY}, or use state_dtype='bf16', which needs nothing."
        ) from None


def form_of(state: Mapping[str, Any]) -> type[MomentForm] | None:
    """Return the form of both moments in a loaded Adam state; None if they are fp32."""
    return next((form for form in FORMS.values() if form is not Fp32Moments and form.found(state) is not None), None)


def in_fp32(state: Mapping[str, Any], room: Callable[[int, torch.device], Tensor] | None = None) -> dict[str, Any]:
    """Return an Adam state, loaded in any form, with moments of fp32; a copy of the dict where they are.

    ``room`` makes (numel,) fp32 numbers for a moment; None: in memory.
    Raises CheckpointError where the form's library can't be imported.
    """
    form = form_of(state)
    if form is None:
        return dict(state)
    try:
        made = form()
    except ImportError as error:
        raise CheckpointError(
            f"the checkpoint's moments are {form.name}, and bitsandbytes, which reads them, can't be imported "
            f"({error}). {LOWBIT_REMEDY}."
        ) from None
    packed = form.found(state) or {}
    like = next(iter(packed.values()))  # of as many elements as the moments
    new = room or (lambda numel, device: torch.empty(numel, dtype=torch.float32, device=device))
    moments = {key: new(like.numel(), like.device) for key in MOMENTS}
    for key, out in moments.items():
        made.unpack(key, packed, out)
    return {**{key: value for key, value in state.items() if key not in packed}, **moments}


def rounded_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``values``, fp32, as bfloat16: one of the two neighbours, the nearer the likelier; exact values stay.

    The bits that bfloat16 lacks carry, with 16 random bits added, into those that it has. Values that are not finite
    are rounded as ``to`` rounds them.
    """
    result = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    pieces = values.detach().contiguous().view(-1).split(_PIECE_NUMEL)
    for piece, target in zip(pieces, result.view(-1).split(_PIECE_NUMEL), strict=True):
        noise = torch.empty(piece.shape, dtype=torch.int32, device=piece.device)
        noise.random_(0, 1 << 16, generator=generator)
        bits = noise.add_(piece.view(torch.int32)).bitwise_and_(-(1 << 16))
        target.copy_(torch.where(piece.isfinite(), bits.view(torch.float32), piece))
    return result
