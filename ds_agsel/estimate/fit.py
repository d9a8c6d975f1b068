"""The search for settings that fit a card and a host: pure, by the estimator's bytes and the predicted seconds.

[Note: Order] Of the settings that fit, those come first that take at most `SLOWER` times as long as the fastest; among
them more percent comes first, then fewer `LOSSY` fields, then less time. The others follow by time, and after all of
them, in the same order, what trains single entries. Times are compared in steps of a hundredth of that bound; settings
that are equal then are in the order of `AXES`.

[Note: Micro-batches] A larger micro-batch is never slower in this model and needs more of the card. So of settings that
differ in it alone the first that fits is kept, from the largest down; if none does, the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from ds_agsel.config import SECTION, SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.activations import Activations
from ds_agsel.estimate.fit_config import ds_config_of
from ds_agsel.estimate.memory import BUILT, Memory, selective_memory
from ds_agsel.estimate.prediction import Rates, Seconds, Work, full_seconds, selective_seconds
from ds_agsel.estimate.setting import AXES, Setting, Unit, settings
from ds_agsel.estimate.setup import Setup, read_setup
from ds_agsel.estimate.shapes import ModelShape
from ds_agsel.estimate.sizes import GIB
from ds_agsel.estimate.steps import Step, Which, typical_step
from ds_agsel.estimate.table import fullest_memory, with_section
from ds_agsel.lottery import build_lottery
from ds_agsel.selection import Phase

SLOWER = 1.5
_NOISE = 0.01  # of the bound: predictions that differ by less are equal
CARD_RESERVE_BYTES, CARD_RESERVE_SHARE = GIB, 0.04  # the driver's context; gaps between the allocator's blocks
HOST_RESERVE_BYTES, PROCESS_BYTES = 2 * GIB, 2 * GIB  # the system; a rank's process without arrays
# ε₀·exp(−λt) with the default λ, as a share of the steps of epoch 1.
EXPLORE_SHARE = (1 - 0.01) / math.log(100)


@dataclass(frozen=True)
class Machine:
    """What there is: ``ranks`` cards in one machine, and the memory that they share. ``nvme_bytes`` None: enough."""

    rates: Rates
    ranks: int
    host_bytes: int
    nvme_bytes: int | None = None
    nvme_path: str = "/local_nvme"

    def spare(self, card_bytes: int, host_bytes: int, nvme_bytes: int = 0) -> dict[str, int]:
        """Return what is left of each place beside the reserve; negative where it is too little."""
        capacity = self.rates.card.capacity_bytes
        return {
            "card": round(capacity * (1 - CARD_RESERVE_SHARE)) - CARD_RESERVE_BYTES - card_bytes,
            "host": self.host_bytes - HOST_RESERVE_BYTES - host_bytes,
            "nvme": 0 if self.nvme_bytes is None else self.nvme_bytes - nvme_bytes,
        }


@dataclass(frozen=True)
class Job:
    """A step's tokens on all ranks together, in rows of ``sequence_length``; a micro-batch of None is searched."""

    sequence_length: int
    tokens_per_step: int
    micro_batch_size: int | None = None

    def rows_per_rank(self, ranks: int) -> int:
        """Return a step's rows on each rank. Raises ConfigError if they don't come out even."""
        unit = self.sequence_length * ranks
        rows, left = divmod(self.tokens_per_step, unit)
        if left or not rows:
            near = sorted({max(1, rows) * unit, (rows + 1) * unit})
            raise ConfigError(
                f"--tokens-per-step={self.tokens_per_step} is not a multiple of --sequence-length x --ranks "
                f"({self.sequence_length} x {ranks}). Use {' or '.join(map(str, near))}."
            )
        return rows


@dataclass(frozen=True)
class Candidate:
    """A setting with what it needs and takes. Bytes of the host and of NVMe are of all ranks together.

    Attributes:
        explained: the needed bytes of card and host by their parts, of one rank.
        seconds, full_seconds: of ds_agsel, and of plain DeepSpeed with the same ds_config; None if it doesn't fit.
        over: by how many bytes each place is too small; empty for a setting that fits.
    """

    setting: Setting
    ds_config: Mapping[str, Any]
    card_bytes: int
    host_bytes: int
    nvme_bytes: int
    explained: Mapping[str, int]
    seconds: Seconds | None
    full_seconds: Seconds | None
    over: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return not self.over

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps of a step."""
        return DsConfig.of(self.ds_config).accumulation_steps or 1

    @property
    def step_seconds(self) -> float:
        """The mean step of epoch 1; infinite for a setting that doesn't fit."""
        return self.seconds.total if self.seconds else math.inf


@dataclass(frozen=True)
class Found:
    """The answer: settings that fit, in the order of [Note: Order], and those that don't, the nearest miss first."""

    model: ModelShape
    machine: Machine
    job: Job
    fitting: tuple[Candidate, ...]
    failing: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The first that fits."""
        return self.fitting[0] if self.fitting else None


def search(
    model: ModelShape, activations: Activations, machine: Machine, job: Job, axes: Mapping[str, Sequence[Any]] = AXES,
    others: Mapping[Unit, ModelShape] | None = None,
) -> Found:  # fmt: skip
    """Return the possible settings of ``axes``, those that fit in their order: [Note: Micro-batches].

    ``others``: the model's shape in other units than blocks.

    Raises ConfigError if the job's tokens can't be dealt out to the ranks.
    """
    rows = job.rows_per_rank(machine.ranks)
    shapes: dict[Unit, ModelShape] = {"block": model, **(others or {})}
    axes = {
        **axes,
        "micro_batch_size": _micro_batches(axes["micro_batch_size"], job, rows),
        "unit": [unit for unit in axes["unit"] if unit in shapes],
    }
    known: dict[Any, Any] = {}
    candidates: dict[Setting, Candidate] = {}
    for setting in settings(axes):
        alike = replace(setting, micro_batch_size=1)
        if alike not in candidates or not candidates[alike].fits:
            evaluation = _Evaluation(setting, shapes[setting.unit], activations, machine, job, known)
            candidates[alike] = evaluation.candidate()
    return found_of(model, machine, job, candidates.values())


def found_of(model: ModelShape, machine: Machine, job: Job, candidates: Collection[Candidate]) -> Found:
    """Return the answer that ``candidates`` give."""
    return Found(model, machine, job, ordered(candidates), _failing(candidates))


def ordered(candidates: Collection[Candidate]) -> tuple[Candidate, ...]:
    """Return those that fit, best first: [Note: Order]."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    whole = [candidate for candidate in fitting if candidate.setting.unit != "entries"]
    bound = SLOWER * min((candidate.step_seconds for candidate in whole or fitting), default=0.0)

    def key(candidate: Candidate) -> tuple[float, ...]:
        setting, seconds = candidate.setting, candidate.step_seconds
        is_slow = seconds > bound
        preferred = (0.0, 0) if is_slow else (-setting.select_percent, setting.lossy)
        return (setting.unit == "entries", is_slow, *preferred, seconds // (_NOISE * bound))

    return tuple(sorted(fitting, key=key))


def _failing(candidates: Collection[Candidate]) -> tuple[Candidate, ...]:
    failing = [candidate for candidate in candidates if not candidate.fits]
    return tuple(
        sorted(failing, key=lambda candidate: (sum(candidate.over.values()), -candidate.setting.select_percent))
    )


def _micro_batches(wanted: Sequence[int], job: Job, rows: int) -> Sequence[int]:
    if job.micro_batch_size is None:
        return [size for size in wanted if rows % size == 0]
    if rows % job.micro_batch_size:
        raise ConfigError(
            f"--micro-batch-size={job.micro_batch_size} doesn't divide the {rows} rows of a step and rank. Use auto, "
            "or change --tokens-per-step."
        )
    return [job.micro_batch_size]


@dataclass(frozen=True)
class _Evaluation:
    """What one setting needs and takes. ``known`` keeps what several settings have in common."""

    setting: Setting
    model: ModelShape
    activations: Activations
    machine: Machine
    job: Job
    known: dict[Any, Any]

    def candidate(self) -> Candidate:
        activations = self.activations.peak_bytes(
            self.setting.micro_batch_size * self.job.sequence_length, checkpointing=self.setting.checkpointing
        )
        is_one = self._setup.accumulation_steps == 1  # all that memory depends on
        memory = self._kept(("memory", self._core, is_one), self._memory)
        loading = self._setup.item_bytes * self.model.numel  # each rank reads the whole model into host memory
        card = memory.accelerator.total + activations
        arrays = max(memory.host.total, loading)
        ranks = self.machine.ranks
        host, nvme = ranks * (arrays + PROCESS_BYTES), ranks * memory.nvme.total
        explained = {
            "weights": memory.accelerator.weights, "gradients": memory.accelerator.gradients,
            "states": memory.accelerator.states + memory.accelerator.master_weights,
            "staging": memory.accelerator.staging, "activations": activations, "host": memory.host.total,
            "rounding": memory.host.rounding, "loading": loading,
        }  # fmt: skip
        over = self._over(card, host, nvme)
        seconds, full = (None, None) if over else self._seconds()
        return Candidate(self.setting, self._ds_config, card, host, nvme, explained, seconds, full, over)

    def _over(self, card: int, host: int, nvme: int) -> dict[str, int]:
        spare = self.machine.spare(card, host, nvme)
        return {place: -amount for place, amount in spare.items() if amount < 0}

    @cached_property
    def _ds_config(self) -> dict[str, Any]:
        rows = self.job.rows_per_rank(self.machine.ranks)
        return ds_config_of(self.setting, rows // self.setting.micro_batch_size, self.machine.nvme_path)

    @cached_property
    def _core(self) -> Setting:
        return replace(self.setting, micro_batch_size=1, checkpointing=False)

    @cached_property
    def _config(self) -> SelectionConfig:
        return self._kept(("config", self._core), lambda: SelectionConfig(**self._ds_config[SECTION]))

    @cached_property
    def _setup(self) -> Setup:
        accumulation = self.job.rows_per_rank(self.machine.ranks) // self.setting.micro_batch_size
        key = ("setup", replace(self._core, select_percent=100.0))
        setup = self._kept(key, lambda: with_section(read_setup(self._ds_config, self.machine.ranks), self._config))
        return setup.but(accumulation_steps=accumulation)

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def _step(self, phase: Phase, which: Which) -> Step:
        config = self._config
        one_backward = self._setup.accumulation_steps == 1 or config.explore_on == "first_micro_batch"
        streaming = BUILT.streaming_top_k and self._setup.stage > 1 and one_backward
        every = config.select_every

        def make() -> Step:
            numels = [block.numel for block in self.model.blocks]
            return typical_step(numels, build_lottery(self.model.blocks, config), phase, which, streaming, every)

        return self._kept(("step", self.setting.unit, config.select_percent, phase, which, streaming, every), make)

    def _memory(self) -> Memory:
        """Return the larger of both phases' worst, place by place: which phase it is differs."""
        model, setup, stepping = self.model, self._setup, self.setting.stepping
        steps = (self._step("exploit", "worst"), self._step("explore", "worst"))
        both = [fullest_memory(setup, partial(selective_memory, model, setup, stepping, step)) for step in steps]
        return Memory(
            *(
                max((getattr(m, place) for m in both), key=lambda b: b.total)
                for place in ("accelerator", "host", "nvme")
            )
        )

    def _seconds(self) -> tuple[Seconds, Seconds]:
        setting, job = self.setting, self.job
        work = Work(
            tokens=job.rows_per_rank(self.machine.ranks) * job.sequence_length,
            sequence_length=job.sequence_length,
            checkpointing=setting.checkpointing,
            hidden=self.activations.input_bytes // self._setup.item_bytes,
            layers=self.activations.layers,
        )
        rates = replace(self.machine.rates, is_pinned=setting.pin_memory)
        exploit, explore = (
            selective_seconds(
                self.model, self._setup, self.setting.stepping, self._step(phase, "expected"), work, rates
            )
            for phase in ("exploit", "explore")
        )
        mean = exploit.mixed(explore, EXPLORE_SHARE / self.setting.select_every)
        plain = self._setup.but(keep_master="host", on_reentry="keep", state_dtype="fp32", master_weights="fp32")
        key = ("full", self.setting.unit, plain, work, setting.pin_memory)
        return mean, self._kept(key, lambda: full_seconds(self.model, plain, work, rates))
