"""A YAML of runs, checked, and the cells that it stands for. Pure: nothing is run or looked up here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_agsel.errors import ConfigError

Options = dict[str, str | int | float | bool | None]  # as on the command line, without dashes; true: a flag; null: none
Kind = Literal["search", "final"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SET_BY_US = {"output", "overwrite", "resume", "seed", "lr", "steps", "model", "deepspeed_config"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variation(_Strict):
    """Settings of a method that differ for one model."""

    deepspeed_config: str | None = None
    options: Options = {}


class Model(_Strict):
    """``model`` is what launch/train.py takes, ``shape`` what `ds-agsel estimate` takes; by default the same."""

    model: str
    shape: str | None = None
    options: Options = {}
    methods: dict[str, Variation] = {}


class MethodEntry(_Strict):
    """One method of the plan.

    ``method`` and ``method_options`` are launch/peers.py's. ``seeds``: null for all of the plan's. ``fails``: a part
    of the message with which it is known to fail.
    """

    method: str
    family: str
    label: str | None = None
    method_options: Options = {}
    deepspeed_config: str | None = None
    options: Options = {}
    seeds: tuple[int, ...] | None = None
    fails: str | None = None


class Family(_Strict):
    """Methods that share a learning rate: the best of ``learning_rates`` in short runs of ``search_with``."""

    learning_rates: tuple[float, ...] = Field(min_length=1)
    search_with: str | None = None


class Search(_Strict):
    """The short runs that choose learning rates. ``jobs`` of them run at once, with ``threads`` threads each."""

    steps: int = Field(ge=1)
    seed: int = Field(ge=0)
    options: Options = {}
    jobs: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)


class Evaluation(_Strict):
    """A call of launch/evaluate.py on a trained model."""

    dataset: str
    rows: int = Field(ge=1)
    options: Options = {}


class Expected(_Strict):
    """Rough seconds of a cell's parts, for the announcement at the start. ``more``: additional seconds of a method."""

    start: float
    step: float
    end: float
    search_step: float | None = None
    more: dict[str, float] = {}


class Cost(_Strict):
    """What the estimate of full scale assumes. ``tokens_per_row`` counts padding."""

    card: str
    card_gigabytes: float
    tokens_per_row: int
    epochs: float
    measured_step_ratios: dict[str, dict[str, float]] = {}


class SweepPlan(_Strict):
    """All runs of a scale. ``options`` go to every run; a model's, a method's, then a variation's override them.

    ``compare_with``: methods to which the others' differences are tabled, by seed and held-out row. ``jobs``: cells at
    once, of one thread each if they are several.
    """

    name: str
    about: str = ""
    deepspeed_config: str
    options: Options = {}
    steps: int = Field(ge=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[str, Model] = Field(min_length=1)
    families: dict[str, Family]
    methods: dict[str, MethodEntry] = Field(min_length=1)
    reference: str
    compare_with: tuple[str, ...] = ()
    search: Search | None = None
    evaluations: tuple[Evaluation, ...] = ()
    time_limit_seconds: float = Field(gt=0)
    jobs: int = Field(1, ge=1)
    keep_models: bool = False
    expected: Expected | None = None
    cost: Cost | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> SweepPlan:
        for name in (*self.models, *self.methods, *self.families, self.name):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name: it becomes a folder's. Use letters, digits and ._-")
        for name, method in self.methods.items():
            if method.family not in self.families:
                raise ValueError(f"methods.{name}.family={method.family!r} is none of {', '.join(self.families)}.")
            for seed in method.seeds or ():
                if seed not in self.seeds:
                    raise ValueError(f"methods.{name}.seeds has {seed}, seeds has not. Add it there.")
        for name, family in self.families.items():
            of_family = [method for method in self.methods if self.methods[method].family == name]
            if not of_family:
                raise ValueError(f"families.{name} has no method. Remove it.")
            if family.search_with is not None and family.search_with not in of_family:
                names = ", ".join(of_family)
                raise ValueError(f"families.{name}.search_with={family.search_with!r} is none of its methods, {names}.")
            if len(family.learning_rates) > 1 and self.search is None:
                raise ValueError(f"families.{name} has learning rates to choose from, and there is no search. Add one.")
        if self.reference not in self.methods:
            raise ValueError(f"reference={self.reference!r} is none of the methods.")
        for name in self.compare_with:
            if name not in self.methods:
                raise ValueError(f"compare_with has {name!r}, which is none of the methods.")
        for name, model in self.models.items():
            for method_name in model.methods:
                if method_name not in self.methods:
                    raise ValueError(f"models.{name}.methods.{method_name} is none of the methods.")
        for options in self._all_options():
            for option in options:
                if option in _SET_BY_US:
                    raise ValueError(f"The option {option} is set by launch/reproduce.py. Remove it from options.")
        return self

    def _all_options(self) -> Iterator[Options]:
        yield self.options
        for model in self.models.values():
            yield model.options
            yield from (variation.options for variation in model.methods.values())
        yield from (method.options for method in self.methods.values())
        if self.search is not None:
            yield self.search.options

    def label(self, method: str) -> str:
        """Return the name of ``method`` in tables."""
        return self.methods[method].label or method


@dataclass(frozen=True)
class Cell:
    """One training run. A final cell's ``lr`` is None until its family's search has ended."""

    kind: Kind
    model: str
    method: str
    family: str
    seed: int
    steps: int
    lr: float | None

    @property
    def name(self) -> str:
        """Its folder below the output folder."""
        last = f"lr-{self.lr:g}" if self.kind == "search" else f"seed-{self.seed}"
        return f"{self.kind}/{self.model}/{self.family if self.kind == 'search' else self.method}/{last}"


def read(path: Path) -> SweepPlan:
    """Read the plan in the YAML file ``path``. Raises ConfigError, which names the setting."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}. Give a YAML file of runs.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Mend it.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings. See configs/paper/tiny.yaml.")
    try:
        return SweepPlan(**found)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_message(error)}") from None


def _first_message(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":  # its input is all that is around it
        return f"{where} is missing. Add it, as configs/paper/tiny.yaml has it."
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {text}. Correct it." if where else text


def search_cells(plan: SweepPlan) -> list[Cell]:
    """Return the short runs of every model and family that has more than one learning rate."""
    if plan.search is None:
        return []
    return [
        Cell("search", model, search_method(plan, family), family, plan.search.seed, plan.search.steps, lr)
        for model in plan.models
        for family in plan.families
        if len(plan.families[family].learning_rates) > 1
        for lr in plan.families[family].learning_rates
    ]


def final_cells(plan: SweepPlan) -> list[Cell]:
    """Return the runs for the tables, seed by seed, so that a sweep that is cut short covers each method."""
    return [
        Cell("final", model, name, method.family, seed, plan.steps, None)
        for seed in plan.seeds
        for model in plan.models
        for name, method in plan.methods.items()
        if method.seeds is None or seed in method.seeds
    ]


def search_method(plan: SweepPlan, family: str) -> str:
    """Return the method whose short runs choose the family's learning rate."""
    return plan.families[family].search_with or next(n for n, m in plan.methods.items() if m.family == family)


def choose_lr(losses: Mapping[float, float | None]) -> float | None:
    """Return the learning rate of the lowest held-out loss, the smaller of equals; None if every run failed."""
    finished = {lr: loss for lr, loss in losses.items() if loss is not None}
    return min(finished, key=lambda lr: (finished[lr], lr)) if finished else None


def arguments(plan: SweepPlan, cell: Cell, lr: float) -> list[str]:
    """Return launch/peers.py's arguments for ``cell``, except ``--output`` and ``--resume`` or ``--overwrite``."""
    model, method = plan.models[cell.model], plan.methods[cell.method]
    variation = model.methods.get(cell.method, Variation())
    searched = plan.search.options if plan.search is not None and cell.kind == "search" else {}
    options = {**plan.options, **model.options, **method.options, **variation.options, **searched}
    config = variation.deepspeed_config or method.deepspeed_config or plan.deepspeed_config
    words = ["--method", method.method]
    for name, value in method.method_options.items():
        words += ["--method-option", f"{name}={value}"]
    words += ["--deepspeed_config", config, "--model", model.model, *_words(options)]
    return [*words, "--lr", f"{lr:g}", "--seed", str(cell.seed), "--steps", str(cell.steps)]


def evaluation_arguments(evaluation: Evaluation) -> list[str]:
    """Return launch/evaluate.py's arguments, except ``--model`` and ``--output``."""
    return ["--dataset", evaluation.dataset, "--rows", str(evaluation.rows), *_words(evaluation.options)]


def _words(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def expected_seconds(plan: SweepPlan, cells: Sequence[Cell]) -> float | None:
    """Estimate how long ``cells`` take, ``jobs`` at a time."""
    if plan.expected is None:
        return None
    expected, total = plan.expected, 0.0
    for cell in cells:
        begins = expected.start + expected.more.get(cell.method, 0.0)
        if cell.kind == "search" and plan.search is not None:
            total += (begins + cell.steps * (expected.search_step or expected.step)) / max(plan.jobs, plan.search.jobs)
        else:
            total += (begins + cell.steps * expected.step + expected.end) / plan.jobs
    return total
