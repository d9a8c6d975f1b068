"""The choice of rows through a step's window: which Linears are gated now, by what, and what was chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ds_agsel.errors import TrainingError
from ds_agsel.gast_section import GastConfig
from ds_agsel.samples.choice import DrawKey, needs_scores, row_weight, take
from ds_agsel.samples.gate import Gate, tap_for, tap_known, without_weight
from ds_agsel.samples.linears import Gated, GatedEntries, GatedForward, Place, gated_linears
from ds_agsel.samples.matrices import Entries, Matrix
from ds_agsel.samples.record import BlockRows, Samples
from ds_agsel.samples.scores import Use
from ds_agsel.samples.support import SupportPass


class RowChoice:
    """Makes the selected blocks of a model learn from some rows of each micro-batch, while a window is open.

    Args:
        root: the model; ``layers`` are its repeated layers, whose Linears are gated.
        block_of: block index by ``id`` of parameter.
        rank: of this process among those that train on other rows.
        record: what was chosen is noted there.

    The owner of the window calls `begin_forward` and `close`.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Iterable[nn.Module],
        block_of: Mapping[int, int],
        config: GastConfig,
        seed: int,
        rank: int,
        record: Samples,
    ) -> None:
        self._config, self._seed, self._rank, self._record = config, seed, rank, record
        self._matrices: dict[int, list[Matrix]] = {}
        self._gated: list[Gated] = []
        names = {id(module): name for name, module in root.named_modules()}
        for block, of_block in gated_linears(layers, block_of).items():
            self._matrices[block] = [matrix for matrix, _ in of_block]
            for number, (matrix, modules) in enumerate(of_block):
                for module in modules:
                    self._gated.append(self._gate_of(module, Place(names[id(module)], block, number, matrix)))
        self._active: Collection[int] = ()
        self._step = 0
        self._micro_step = -1  # the number of the forward in the window
        self._rows: int | None = None  # of the running forward, once a Linear has said it
        self._gates: dict[int, Gate] = {}
        self._open: list[Gate] = []  # that have not run: also those of earlier forwards
        self._support: SupportPass | None = None  # of the window
        self._collects = False  # whether the support pass is running
        self._known: dict[int, Tensor | None] = {}  # the taken rows, by block, where no scores are needed

    def _gate_of(self, module: nn.Module, place: Place) -> Gated:
        if isinstance(place.matrix, Entries):
            return GatedEntries(place.matrix.target, place, self._tapped_entries)
        if isinstance(module, nn.Linear):
            return GatedForward(module, place, self._tapped)
        raise TypeError(f"{place.name} is no Linear")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have gated Linears."""
        return tuple(sorted(self._matrices))

    def begin_forward(self, step: int, active: Collection[int]) -> None:
        """Note that a forward of ``step``'s window begins, in which the blocks ``active`` choose rows."""
        self._step, self._active = step, active
        self._micro_step += 1
        self._rows = None
        self._gates.clear()
        self._known.clear()
        self._record.begin_forward(self._micro_step)

    @contextmanager
    def collecting(self, device: torch.device) -> Iterator[SupportPass]:
        """Inside, the selected blocks' Linears leave what a forward and `SupportPass.run` bring them, as support."""
        self._support = SupportPass(device)
        self._collects = True
        try:
            yield self._support
        finally:
            self._collects = False

    @property
    def needs_support(self) -> bool:
        """Whether the forward that begins now is the first of a window whose rows are scored against support data."""
        return self._config.needs_support_data and self._micro_step == 0 and bool(self._active)

    @property
    def chooses(self) -> bool:
        """Whether a block that needs gradients in this window has gated Linears."""
        return any(block in self._active for block in self._matrices)

    def close(self) -> None:
        """End the window: no Linear is gated until the next forward begins."""
        for gate in self._open:
            gate.drop()
        self._open.clear()
        self._gates.clear()
        self._known.clear()
        self._support = None
        self._active, self._micro_step = (), -1

    def remove(self) -> None:
        """Give the Linears their own forward again."""
        self.close()
        for gated in self._gated:
            gated.remove()

    # -------------------------------------------------------------------------- forward

    @torch.compiler.disable
    def _tapped(self, module: nn.Linear, place: Place, x: Tensor) -> Tensor:
        if place.block not in self._active or not torch.is_grad_enabled() or not module.weight.requires_grad:
            return nn.functional.linear(x, module.weight, module.bias)
        return self._through(place, x, without_weight(module, x))

    @torch.compiler.disable
    def _tapped_entries(self, place: Place, x: Tensor, y: Tensor) -> Tensor | None:
        return self._through(place, x, y) if place.block in self._active else None

    def _through(self, place: Place, x: Tensor, y: Tensor) -> Tensor:
        """Return the output ``y`` of a Linear that learns from some rows, tapped."""
        block, matrix = place.block, place.matrix
        if self._collects and self._support is not None:
            return tap_for(
                self._support.of_block(block, self._matrices[block]), self._support.token, place.number, x, y
            )
        rows = self._checked_rows(place.name, x)
        if needs_scores(self._config, rows):
            return self._gate(block).tap(place.number, x, y)
        taken = self._known_rows(block, rows, x.device)
        weight = 1.0 if taken is None else row_weight(rows, taken.numel())
        return tap_known(x, y, matrix, taken, weight)

    def _checked_rows(self, name: str, x: Tensor) -> int:
        """Return the rows of ``x``. Raises TrainingError, naming the Linear, where they can't be told."""
        if x.dim() < 3:
            raise TrainingError(
                f"adagrad_select.gast: {name} got an input of shape {tuple(x.shape)}, in which the rows of the batch "
                "can't be told from tokens: padding-free batches and experts flatten them. Use padded batches, put its "
                "block in adagrad_select.never_select, or remove gast."
            )
        if self._rows is None:
            self._rows = x.shape[0]
        if x.shape[0] != self._rows:
            raise TrainingError(
                f"adagrad_select.gast: {name} got {x.shape[0]} rows in a forward whose other Linears got {self._rows}. "
                "Put its block in adagrad_select.never_select, or remove gast."
            )
        return self._rows

    def _gate(self, block: int) -> Gate:
        gate = self._gates.get(block)
        if gate is None:
            micro_step = self._micro_step

            def choose(uses: dict[int, list[Use]], rows: int) -> Tensor | None:
                return self._choose(block, micro_step, uses, rows)

            gate = Gate(self._matrices[block], choose, row_weight, self._done)
            self._gates[block] = gate
            self._open.append(gate)
        return gate

    def _known_rows(self, block: int, rows: int, device: torch.device) -> Tensor | None:
        if block not in self._known:
            taken = take(self._config, rows, self._key(block, self._micro_step), None, device)
            self._known[block] = taken
            self._record.note(block, self._micro_step, BlockRows(rows, taken))
        return self._known[block]

    # ------------------------------------------------------------------------- backward

    def _choose(self, block: int, micro_step: int, uses: dict[int, list[Use]], rows: int) -> Tensor | None:
        matrices = self._matrices[block]
        if self._support is not None:
            scores = self._support.scores(block, matrices, uses)
        else:
            scores = torch.stack([matrices[number].of_halves(of_linear) for number, of_linear in uses.items()]).sum(0)
        taken = take(self._config, rows, self._key(block, micro_step), scores, scores.device)
        self._record.note(block, micro_step, BlockRows(rows, taken))
        return taken

    def _done(self, gate: Gate) -> None:
        self._open.remove(gate)
        for block, current in list(self._gates.items()):
            if current is gate:
                del self._gates[block]

    def _key(self, block: int, micro_step: int) -> DrawKey:
        return DrawKey(self._seed, self._step, micro_step, self._rank, block)
