"""The settings that `ds-agsel fit` tries: what goes together, and in which order.

[Note: Units] With `unit` "module" single matrices are selected, with "entries" `sparse_grad` trains a few entries of
each. A model divided that way has a shape of its own; without one the unit is not tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from ds_agsel.estimate.memory import Stepping

# Where states are and AdamW runs: on the host by ZeRO-Offload, on the accelerator with states that visit, in files.
Home = Literal["host", "visit", "nvme"]
HOME_WORDS: Mapping[Home, str] = {
    "host": "AdamW on the host",
    "visit": "states visit the card",
    "nvme": "states on NVMe",
}

Unit = Literal["block", "module", "entries"]  # [Note: Units]

# What is tried of each setting; the first is what a tie goes to. One more axis is one more line here and one field of
# `Setting`. `fit_config` writes it, and `read_setup` reads it back.
AXES: Mapping[str, Sequence[Any]] = {
    "select_percent": (100.0, 75.0, 50.0, 40.0, 30.0, 20.0, 10.0),
    "home": get_args(Home),
    "stage": (2, 3, 1),
    "offload_param": ("none", "cpu", "nvme"),
    "pin_memory": (True, False),
    "keep_master": ("host", "accelerator"),
    "master_weights": ("fp32", "split"),
    "state_dtype": ("fp32", "bf16", "int8"),
    "select_every": (1, 20),
    "on_reentry": ("keep", "reset"),
    "unit": get_args(Unit),
    "explore_on": ("batch", "first_micro_batch"),
    "checkpointing": (False, True),
    "micro_batch_size": (64, 32, 16, 8, 4, 2, 1),
}
_MOST_SPECIALS = 2  # so that the search takes seconds: what is left out is near to what is tried
_FREE_AXES = ("select_percent", "checkpointing", "micro_batch_size")  # go with everything
# Fields by which a run learns otherwise, with the value by which it doesn't.
LOSSY: Mapping[str, Any] = {
    "state_dtype": "fp32", "select_every": 1, "on_reentry": "keep", "unit": "block", "explore_on": "batch"
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One point of the search; see `AXES`."""

    select_percent: float
    home: Home
    stage: int
    offload_param: str
    pin_memory: bool
    keep_master: str
    master_weights: str
    state_dtype: str
    select_every: int
    on_reentry: str
    unit: Unit
    explore_on: str
    checkpointing: bool
    micro_batch_size: int

    @property
    def is_possible(self) -> bool:
        """Whether the fields go together. A field that means nothing in this company has its first value."""
        is_whole, is_lean = self.unit != "entries", (self.master_weights, self.state_dtype) != ("fp32", "fp32")
        return (
            (self.offload_param == "none" or self.stage == 3)
            and (self.home != "nvme" or (self.stage == 3 and is_whole))
            and (self.home == "host" or self.pin_memory)
            and (self.explore_on == "batch" or self.stage > 1)
            and (self.master_weights == "fp32" or (self.offload_param == "none" and is_whole))
            and (is_whole or self.offload_param != "nvme")
            and (self.keep_master == "host" or (self.home == "visit" and not is_lean))
            and self._is_in_rounds_where_it_pays
            and self._specials <= _MOST_SPECIALS
            and (
                self.unit == "block" or (self.keep_master, self.explore_on, self.pin_memory) == ("host", "batch", True)
            )
        )

    @property
    def _specials(self) -> int:
        """How many settings are no first values; the two forms of leaner states count as one."""
        return sum((
            self.stage == 1, self.offload_param != "none", not self.pin_memory, self.keep_master != "host",
            (self.master_weights, self.state_dtype) != ("fp32", "fp32"), self.select_every > 1, self.unit != "block",
            self.explore_on != "batch",
        ))  # fmt: skip

    @property
    def _is_in_rounds_where_it_pays(self) -> bool:
        """Whether a selection stands for a step, or for many to save transfers or, as in BAdam, moments at rest."""
        if self.on_reentry == "reset":
            is_plain = (self.unit, self.explore_on, self.state_dtype) == ("block", "batch", "fp32")
            return is_plain and self.select_every == 20 and self.home != "nvme"
        is_fp32 = (self.master_weights, self.state_dtype) == ("fp32", "fp32")
        return self.select_every == 1 or (self.home == "visit" and self.unit == "block" and is_fp32)

    @property
    def stepping(self) -> Stepping:
        """The estimator's word for the home."""
        return "accelerator" if self.home == "visit" else "host"

    @property
    def lossy(self) -> int:
        """How many fields make the run learn otherwise."""
        return sum(getattr(self, field) != exact for field, exact in LOSSY.items())


def settings(axes: Mapping[str, Sequence[Any]] = AXES) -> Iterator[Setting]:
    """Yield the possible settings of ``axes``, in their order."""
    tied = [name for name in axes if name not in _FREE_AXES]
    free = {name: axes[name][0] for name in _FREE_AXES}
    cores = [
        core for core in (dict(zip(tied, values)) for values in product(*(axes[name] for name in tied)))
        if Setting(**free, **core).is_possible
    ]  # fmt: skip
    for percent, core, *others in product(
        axes["select_percent"], cores, axes["checkpointing"], axes["micro_batch_size"]
    ):
        yield Setting(**dict(zip(_FREE_AXES, (percent, *others), strict=True)), **core)
