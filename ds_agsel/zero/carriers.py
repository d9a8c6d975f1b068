"""SparseGrad under ZeRO: when energies are gathered, when entries are chosen, and how their values reach the matrices.

ZeRO sees the carriers, parameters of K values, and nothing else ([Note: Carriers] in `sparse.targets`). This is the
rest, per step:

- the first `calibration_steps` windows gather the gradients' energy and change nothing: no weight, count or schedule;
- after the update of a block its matrices are written anew, W = round(base + scatter(S) U'), summed in fp32, so that
  small updates add up where a bf16 weight would round each of them away;
- by the block's own clock its last `calibration_steps` windows before every `refresh_steps`-th update gather again, and
  after that update its entries are chosen anew: base = W, S = 0, the states of S as before its first update.

With ZeRO-3 each rank writes its own slice of a matrix; only the carriers are gathered.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_agsel.errors import CheckpointError, TrainingError
from ds_agsel.residency.page_locked import pinned
from ds_agsel.sparse.basis import Energy, Support
from ds_agsel.sparse.linear import added_rows
from ds_agsel.sparse.record import MatrixRecord, SparseRecord
from ds_agsel.sparse.targets import Target
from ds_agsel.sparse_grad_section import SparseGradConfig
from ds_agsel.zero import compat
from ds_agsel.zero.entry_choice import choose_for_all
from ds_agsel.zero.tag_files import TagFiles

if TYPE_CHECKING:
    from ds_agsel.zero.selective import SelectiveStep

logger = logging.getLogger("ds_agsel")

STATE_FILE = "sparse_grad.pt"  # the trained entries of each matrix, and the matrix that they are added to
ENERGY_FILE = "sparse_grad_rank_{rank:05d}.pt"  # what a rank has gathered for the next choice
MOST_LOST_WINDOWS = 100  # in a row, before calibration gives up


@dataclass
class _Slice:
    """The elements of a matrix that this rank holds: all of them, or with ZeRO-3 its flat partition without padding."""

    weights: Tensor  # (numel,), a view of where they are
    start: int


class Carriers:
    """The targets of one engine, from the end of `deepspeed.initialize` on.

    Args:
        stage: the restricted optimizer.
        param_groups: indices of the base optimizer's groups that hold carriers.
    """

    def __init__(
        self,
        stage: SelectiveStep,
        section: SparseGradConfig,
        targets: Sequence[Target],
        param_groups: Sequence[int],
    ) -> None:
        self._stage, self._section = stage, section
        self._targets = tuple(targets)
        block_of = {name: block.index for block in stage.selection.blocks for name in block.parameter_names}
        self._block_of = {target.name: block_of[target.carrier_name] for target in targets}
        self._param_groups = tuple(param_groups)
        self._calibrated = self._lost = 0
        self._updates = dict.fromkeys(self._block_of.values(), 0)  # of each block, since its entries were chosen
        self._energies: dict[str, Energy] = {}
        self._bases = {target.name: self._host_copy(target) for target in self._targets}
        self.record = SparseRecord()
        self._describe({})

    # ------------------------------------------------------------------------ a window

    @property
    def is_calibrating(self) -> bool:
        """Whether the next step gathers energies and changes nothing: until all entries are chosen, and never again."""
        return any(target.support is None for target in self._targets)

    def gather_from(self, blocks: Collection[int]) -> None:
        """Let the next backward gather the energies that are due of matrices of ``blocks``."""
        for target in self._targets:
            is_due = self._block_of[target.name] in blocks and self._is_due(target)
            target.energy = self._energy(target) if is_due else None

    def _is_due(self, target: Target) -> bool:
        refresh = self._section.refresh_steps
        if self.is_calibrating or refresh is None:
            return self.is_calibrating
        return self._updates[self._block_of[target.name]] >= refresh - self._section.calibration_steps

    def _key(self, target: Target) -> str:
        """Return what the matrices that share a basis with ``target`` have in common."""
        return target.kind if self._section.basis == "kind" else target.name

    def _energy(self, target: Target) -> Energy:
        key = self._key(target)
        if key not in self._energies:
            self._energies[key] = target.new_energy(self._section.rotation, _device())
        return self._energies[key]

    def end_calibration_window(self) -> None:
        """End a window that only gathered energies: nothing is updated, counted or scheduled. Collective.

        A window in which a gradient was not finite on any rank does not count. Raises TrainingError after
        `MOST_LOST_WINDOWS` of them in a row.
        """
        self._stage.change_nothing(is_overflow=self._count_window(), is_applied=False)
        self._stage.selection.skip()

    def _count_window(self) -> bool:
        """Count a window of calibration, and choose the entries after the last; return whether it does not count."""
        lost = torch.stack([energy.lost for energy in self._energies.values()]).amax()
        if dist.get_world_size() > 1:
            dist.all_reduce(lost, op=dist.ReduceOp.MAX)
        if bool(lost):
            self._lost += 1
            if self._lost >= MOST_LOST_WINDOWS:
                raise TrainingError(
                    f"adagrad_select.sparse_grad: the gradients of {self._lost} windows in a row were not finite, so "
                    "that no entries can be chosen. Check the data and the model's weights, or train in bf16."
                )
        else:
            self._lost = 0
            self._calibrated += 1
        for energy in self._energies.values():
            energy.lost.zero_()
        if self._calibrated >= self._section.calibration_steps:
            self._choose(self._targets)
            logger.info("adagrad_select.sparse_grad: %s", self._in_words())
        self.record.calibration_left = self._calibration_left
        return bool(lost)

    def _in_words(self) -> str:
        return (
            f"{100 * self.record.trained_fraction:.3g} % of the elements of {len(self._targets)} matrices are trained; "
            f"they hold {100 * (self.record.captured or 0):.3g} % of the gradients' energy."
        )

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, the carriers' param groups have their learning rate and no weight decay, whatever a scheduler set."""
        groups = [self._stage.optimizer.param_groups[index] for index in self._param_groups]
        before = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"], group["weight_decay"] = group["lr"] * self._section.lr_factor, 0.0
        try:
            yield
        finally:
            for group, (lr, weight_decay) in zip(groups, before):
                group["lr"], group["weight_decay"] = lr, weight_decay

    def after_update(self, blocks: Iterable[int]) -> None:
        """Write the matrices of ``blocks``, which were updated; choose entries anew where due. Collective."""
        updated = set(blocks)
        targets = [target for target in self._targets if self._block_of[target.name] in updated]
        self._write(targets)
        for block in updated & self._updates.keys():
            self._updates[block] += 1
        limit = self._section.refresh_steps  # a resumed run may have a lower one than the updates that it loaded
        over = [t for t in targets if limit is not None and self._updates[self._block_of[t.name]] >= limit]
        if over:
            self._choose(over)
            self._restart(over)

    # ------------------------------------------------------------------------- matrices

    def _slice(self, target: Target) -> _Slice:
        weight: Any = target.weight
        if not hasattr(weight, "ds_tensor"):
            return _Slice(weight.data.view(-1), 0)
        partition = weight.ds_tensor.data.view(-1)
        start = dist.get_rank(group=weight.ds_process_group) * partition.numel()
        return _Slice(partition[: max(0, min(partition.numel(), weight.ds_numel - start))], start)

    def _host_copy(self, target: Target) -> Tensor:
        return pinned(self._slice(target).weights.detach().to("cpu", copy=True), get_accelerator())

    def _write(self, targets: Sequence[Target]) -> None:
        """Write base + scatter(S) U' to the matrices of ``targets``, one at a time. Collective with ZeRO-3."""
        targets = [target for target in targets if target.support is not None]
        carriers = [target.carrier for target in targets]
        is_partitioned = any(hasattr(target.weight, "ds_tensor") for target in targets)
        traffic = self._stage.selection.current_traffic
        if is_partitioned:
            traffic.gathered_bytes += sum(compat.gathered_bytes(c) for c in carriers if not compat.is_gathered(c))
        with deepspeed.zero.GatheredParameters(carriers) if is_partitioned else nullcontext():
            for target in targets:
                self._write_one(target)
        if is_partitioned:
            traffic.gathered_bytes += compat.gather_again([target.weight for target in targets])

    def _write_one(self, target: Target) -> None:
        support, here = target.support, self._slice(target)
        if support is None or not here.weights.numel():
            return
        columns, end = target.shape[1], here.start + here.weights.numel()
        rows = slice(here.start // columns, -(-end // columns))
        added = added_rows(target.carrier.detach(), support, rows, target.lines_are_rows).reshape(-1)
        first = here.start - rows.start * columns
        base = self._bases[target.name]
        self._stage.selection.current_traffic.h2d_bytes += base.numel() * base.element_size()
        whole = added[first : first + base.numel()].add_(base.to(added.device, non_blocking=True))
        here.weights.copy_(whole)

    def _restart(self, targets: Sequence[Target]) -> None:
        """Let ``targets`` go on from their matrices as they are: base = W, S = 0, no moments."""
        for target in targets:
            self._bases[target.name] = self._host_copy(target)
            self._updates[self._block_of[target.name]] = 0
        self._zero([target.carrier for target in targets])

    def _zero(self, carriers: Sequence[nn.Parameter]) -> None:
        """Set ``carriers``, all members of their groups, to 0, with states as before their first update."""
        stage = self._stage
        groups = sorted({stage.group_of(carrier) for carrier in carriers})
        with stage.home.writable(groups):
            for group in groups:
                master = compat.masters(stage)[group]
                master.data.zero_()
                state = stage.optimizer.state.get(master, {})
                if state:
                    state.update(compat.new_adam_state(stage.optimizer, master))
        for carrier in carriers:
            compat.zero_weights(carrier)

    def restart(self) -> None:
        """Go on from the matrices as they are, as at the start, calibration included."""
        self._restart(self._targets)
        self._calibrated = self._lost = 0
        self._energies.clear()
        for target in self._targets:
            target.support = target.energy = None
        self._describe({})

    # -------------------------------------------------------------------------- entries

    def _choose(self, targets: Sequence[Target]) -> None:
        """Choose the entries of ``targets`` by their energies, which are dropped: on rank 0, for all. Collective."""
        chosen: dict[str, Support] = {}
        for target in targets:
            key = self._key(target)
            if key not in chosen:
                times = self.record.matrices[target.name].chosen
                draw_key = (self._stage.selection.config.seed, key, times)
                chosen[key] = choose_for_all(target, self._energies.pop(key), self._section, draw_key)
            target.support, target.energy = chosen[key], None
        self._describe({target.name: 1 for target in targets})

    def _describe(self, chosen: Mapping[str, int]) -> None:
        for target in self._targets:
            before = self.record.matrices.get(target.name)
            support = target.support
            self.record.matrices[target.name] = MatrixRecord(
                entries=target.entries,
                numel=target.shape[0] * target.shape[1],
                captured=None if support is None else support.captured,
                captured_plain=None if support is None else support.captured_plain,
                chosen=(0 if before is None or support is None else before.chosen) + chosen.get(target.name, 0),
                lines=target.num_lines,
                reach=() if support is None else support.reach,
            )
        self.record.calibration_left = self._calibration_left

    @property
    def _calibration_left(self) -> int:
        return max(1, self._section.calibration_steps - self._calibrated) if self.is_calibrating else 0

    # ----------------------------------------------------------------------- checkpoints

    def state_dict(self, whole: bool = True) -> dict[str, Any]:
        """Return what a resume needs, on the host; the matrices only if ``whole``. Collective.

        ``values`` are the carriers, (K,); ``base`` is each matrix as it was when its entries were chosen, (numel,), in
        the model's dtype.
        """
        return {
            "section": self._section.model_dump(mode="json"),
            "calibrated": self._calibrated,
            "updates": dict(self._updates),
            "chosen": {name: matrix.chosen for name, matrix in self.record.matrices.items()},
            "values": self._values(),
            "base": {target.name: base if whole else None for target, base in map(self._with_base, self._targets)},
            "support": {t.name: None if t.support is None else t.support.state() for t in self._targets},
        }

    def _values(self) -> dict[str, Tensor]:
        """Return the carriers as forward's weights are, whole. Collective with ZeRO-3."""
        carriers = [target.carrier for target in self._targets]
        is_partitioned = any(hasattr(carrier, "ds_tensor") for carrier in carriers)
        with deepspeed.zero.GatheredParameters(carriers) if is_partitioned else nullcontext():
            return {target.name: target.carrier.detach().to("cpu", copy=True) for target in self._targets}

    def _with_base(self, target: Target) -> tuple[Target, Tensor]:
        base = self._bases[target.name]
        weight: Any = target.weight
        if not hasattr(weight, "ds_tensor") or dist.get_world_size() == 1:
            return target, base
        partition_numel = weight.ds_tensor.numel()
        mine = torch.zeros(partition_numel, dtype=base.dtype, device=_device())
        mine[: base.numel()] = base.to(mine.device)
        whole = mine.new_empty(partition_numel * dist.get_world_size(group=weight.ds_process_group))
        dist.all_gather_into_tensor(whole, mine, group=weight.ds_process_group)
        return target, whole[: weight.ds_numel].cpu()

    def save(self, folder: Path, state: Mapping[str, Any] | None) -> list[Path]:
        """Write ``state``, unless it is None, and what this rank has gathered; return the files' paths."""
        contents: dict[Path, Any] = {}
        if state is not None:
            contents[folder / STATE_FILE] = state
        if self._energies:
            contents[folder / ENERGY_FILE.format(rank=dist.get_rank())] = self.energy_state()
        for path, content in contents.items():
            torch.save(content, path)
        return list(contents)

    def load(self, state: Mapping[str, Any], files: TagFiles) -> None:
        """Go on from ``state`` and the ranks' files beside it. Collective."""
        self.load_state_dict(state)
        names = files.names(ENERGY_FILE.replace("{rank:05d}", "*"))
        if len(names) == dist.get_world_size():
            names = [names[dist.get_rank()]]
        elif dist.get_rank() != 0:
            names = []  # rank 0 takes the sum of other ranks' than these
        self.load_energies(map(files.load, names))

    def energy_state(self) -> dict[str, list[Tensor]]:
        """Return what this rank has gathered since entries were last chosen, on the host. Empty most of the time."""
        return {key: [tensor.cpu() for tensor in energy.tensors()] for key, energy in self._energies.items()}

    def load_energies(self, states: Iterable[Mapping[str, list[Tensor]]]) -> None:
        """Go on gathering from the sum of ``states``."""
        self._energies = {}
        for state in states:
            for target in self._targets:
                key = self._key(target)
                if key in state:
                    fresh = key not in self._energies
                    for tensor, saved in zip(self._energy(target).tensors(), state[key]):
                        tensor.copy_(saved) if fresh else tensor.add_(saved.to(tensor.device))

    def check_compatible(self, state: Mapping[str, Any], source: str) -> None:
        """Raise CheckpointError, naming ``source``, unless ``state`` is of these matrices and this sub-section."""
        here = self._section.model_dump(mode="json")
        saved = {"choice": "energy", **state["section"]}  # older files lack it
        for field in ("entries_percent", "rotation", "basis", "choice"):
            if saved.get(field) != here[field]:
                raise CheckpointError(
                    f"{source} was saved with adagrad_select.sparse_grad.{field}={saved.get(field)!r}, and "
                    f"this run has {here[field]!r}. Use the saved value, or load the weights alone: "
                    "load_module_only=True."
                )
        if sorted(state["base"]) != sorted(self._bases):
            raise CheckpointError(
                f"{source} was saved with entries of {len(state['base'])} matrices that are not this run's "
                f"{len(self._bases)}. Use the adagrad_select.sparse_grad.modules it was saved with."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, and write every matrix anew. The carriers and their states are loaded. Collective."""
        self._calibrated = int(state["calibrated"])
        self._updates = {int(block): int(count) for block, count in state["updates"].items()}
        shared: dict[str, Support] = {}  # one for the matrices that share a basis
        for target in self._targets:
            here = self._slice(target)
            piece = state["base"][target.name][here.start : here.start + here.weights.numel()]
            self._bases[target.name] = pinned(piece.to(here.weights.dtype).clone(), get_accelerator())
            if not hasattr(target.carrier, "ds_tensor"):  # else the load has made it from its master
                target.carrier.data.copy_(state["values"][target.name])
            saved = state["support"][target.name]
            if saved is not None:
                shared.setdefault(self._key(target), Support(**saved).to(_device()))
            target.support = shared.get(self._key(target))
        self._describe({})
        for name, count in state["chosen"].items():
            self.record.matrices[name] = MatrixRecord(**{**vars(self.record.matrices[name]), "chosen": int(count)})
        self._write(self._targets)


def sparse_state(files: TagFiles) -> Mapping[str, Any]:
    """Return what `Carriers.state_dict` gave to a tag. Raises CheckpointError if the tag has none."""
    if not files.has(STATE_FILE):
        raise CheckpointError(
            f"checkpoint {files.folder} has no {STATE_FILE}: it was saved without adagrad_select.sparse_grad, or is a "
            "universal one, which does not hold it. Load the weights alone: load_module_only=True."
        )
    state: Mapping[str, Any] = files.load(STATE_FILE)
    return state


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())
