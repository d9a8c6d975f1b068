"""The ``adagrad_select`` section of a ds_config: fields, ranges, and one clear error for each mistake."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ds_agsel import presets
from ds_agsel.errors import ConfigError, ConfigErrors
from ds_agsel.gast_section import GAST, GastConfig
from ds_agsel.sparse_grad_section import SPARSE_GRAD, SparseGradConfig

SECTION = "adagrad_select"
Granularity = Literal["block", "module"]

# Other names under which a user may look for the section; DeepSpeed would ignore them silently.
_MISTAKEN_SECTIONS = ("ds_agsel", "agsel")
OWN_POLICIES = (
    "adagrad_select",
    "all",
    "cost_aware",
    "cyclic",
    "fixed",
    "gradient_topk",
    "grass",
    "misa",
    "random",
    "replay",
)
# Fields that these policies alone read. A policy that the user has registered may read any.
_READERS = {
    "score_decay": ("cost_aware", "grass", "misa"),
    "temperature": ("cost_aware", "grass", "misa"),
    "refresh_every": ("cost_aware", "grass", "misa"),
    "probe_steps": ("cost_aware", "grass"),
}
_SIMILAR = 0.8  # difflib ratio: two letters of "adagradselect" may be wrong, "adagrad" alone is another word


# Objects within the section, each with a file of its own; their errors are told here.
_SUB_SECTIONS: dict[str, type[BaseModel]] = {GAST: GastConfig, SPARSE_GRAD: SparseGradConfig}
_NULL_IS_NEVER = ("refresh_steps",)  # null is a value of theirs, where it means "not set" elsewhere


class SelectionConfig(BaseModel):
    """The checked section. docs/design.md has the fields' meaning.

    ``None`` and ``"auto"`` stand for "not set" and give the default. Raises ConfigError for anything else
    that a field does not take; types are not converted, except an integer where a number is asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    enabled: bool = True
    preset: Literal["recommended", "adagrad_select", "badam", "lisa", "misa", "grass"] | None = None
    policy: str = Field("adagrad_select", min_length=1)
    granularity: Granularity = "block"
    select_percent: float = Field(20.0, gt=0, le=100)
    select_every: int = Field(1, ge=1)
    explore_rate: float = Field(1.0, ge=0, le=1)
    explore_decay: float | None = Field(None, ge=0)
    smoothing: float = Field(1.0, gt=0)
    exploit_draw: Literal["sample", "top"] = "sample"
    score: Literal["sum", "norm", "rms"] = "sum"
    score_decay: float = Field(0.8, ge=0, lt=1)
    temperature: float = Field(1.0, gt=0)
    refresh_every: int | None = Field(None, ge=1)
    probe_steps: int = Field(5, ge=1)
    always_select: tuple[str, ...] = ()
    never_select: tuple[str, ...] = ()
    steps_per_epoch: int | None = Field(None, ge=1)
    seed: int = Field(42, ge=0)
    step_device: Literal["cpu", "accelerator"] | None = None
    keep_master: Literal["host", "accelerator"] = "host"
    state_budget_bytes: int | None = Field(None, ge=1)
    on_reentry: Literal["keep", "reset", "decay"] = "keep"
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    master_weights: Literal["fp32", "split"] = "fp32"
    explore_on: Literal["batch", "first_micro_batch"] = "batch"
    blocks: dict[str, tuple[str, ...]] | None = None
    fixed_blocks: tuple[str, ...] | None = None
    replay_file: str | None = Field(None, min_length=1)
    gast: GastConfig | None = None
    sparse_grad: SparseGradConfig | None = None

    def __init__(self, **fields: Any) -> None:
        given = {key: value for key, value in fields.items() if not _is_unset(value)}
        filled = presets.fill(given)
        try:
            super().__init__(**filled)
        except ValidationError as error:
            found = _messages(error, filled)
            raise ConfigErrors([problem + presets.added(given, problem, SECTION) for problem in found]) from None

    def is_preset(self, field: str) -> bool:
        """Return whether the preset, and not the user, has given ``field`` its value."""
        return presets.fills(self.preset, field, getattr(self, field))

    @field_validator("always_select", "never_select", "fixed_blocks", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("blocks", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: cls._list_to_tuple(patterns) for key, patterns in value.items()}

    @field_validator(*_SUB_SECTIONS, mode="before")
    @classmethod
    def _only_set(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        is_null = {key for key in _NULL_IS_NEVER if value.get(key, ...) is None}
        return {key: content for key, content in value.items() if not _is_unset(content) or key in is_null}

    @model_validator(mode="after")
    def _check_combinations(self) -> SelectionConfig:
        problems = list(self._combination_problems())
        if problems:
            raise ConfigErrors(problems)
        return self

    def _combination_problems(self) -> Iterator[str]:
        for field, default in (("keep_master", "host"), ("state_budget_bytes", None)):
            if self.step_device == "cpu" and getattr(self, field) != default:
                yield (
                    f"{SECTION}.{field}={_shown(getattr(self, field))} is about states on the accelerator, and"
                    f' {SECTION}.step_device="cpu" leaves them on the host. Remove one of the two.'
                )
        both = sorted(set(self.always_select) & set(self.never_select))
        if both:
            yield contradiction(both)
        yield from self._scoring_field_problems()
        yield from self._policy_field_problems("fixed_blocks", "fixed")
        yield from self._policy_field_problems("replay_file", "replay")
        if self.policy == "replay" and self.select_every > 1:
            yield (
                f'{SECTION}.policy="replay" and {SECTION}.select_every={self.select_every} exclude each other: the'
                f" replayed file already has the blocks of every step. Remove {SECTION}.select_every."
            )
        if self.policy == "replay" and (self.always_select or self.never_select):
            setting = "always_select" if self.always_select else "never_select"
            yield (
                f'{SECTION}.policy="replay" and {SECTION}.{setting}={_shown(getattr(self, setting))} exclude'
                " each other: the replayed file already says which blocks are updated. Remove"
                f" {SECTION}.{setting}."
            )
        if self.fixed_blocks == ():
            yield f"{SECTION}.fixed_blocks=[] is empty. Name at least one block to update."
        if self.blocks is not None:
            yield from _pattern_problems(self.blocks)
            if self.granularity == "module":
                yield (
                    f'{SECTION}.granularity="module" and {SECTION}.blocks exclude each other: the one makes each '
                    f"matrix in the layers a unit, the other names the units. Remove {SECTION}.blocks, or set "
                    f'{SECTION}.granularity to "block".'
                )
        for name in _SUB_SECTIONS:
            sub_section = getattr(self, name)
            if sub_section is not None:
                yield from sub_section.problems(f"{SECTION}.{name}")
        if self.granularity == "module" and self.sparse_grad is not None:
            yield (
                f'{SECTION}.granularity="module" and {SECTION}.sparse_grad exclude each other: modules are drawn until'
                " their elements fill select_percent, and entries hardly count, so that these matrices would nearly"
                f' always be drawn. Set {SECTION}.granularity to "block": they are selected with their layer.'
            )

    def _scoring_field_problems(self) -> Iterator[str]:
        for field, readers in _READERS.items():
            is_set = getattr(self, field) != type(self).model_fields[field].default
            if is_set and self.policy in OWN_POLICIES and self.policy not in readers:
                yield (
                    f'{SECTION}.{field}={_shown(getattr(self, field))} is not read by {SECTION}.policy="{self.policy}",'
                    f" but by {quoted(readers)}. Remove {field}, or set the policy to one of these."
                )
        if self.explore_on != "batch" and self.policy in _READERS["probe_steps"]:
            yield (
                f'{SECTION}.explore_on="{self.explore_on}" can\'t be used with {SECTION}.policy="{self.policy}", whose'
                ' probing steps score whole batches. Set explore_on to "batch".'
            )

    def _policy_field_problems(self, field: str, policy: str) -> Iterator[str]:
        value = getattr(self, field)
        if value is None and self.policy == policy:
            yield f'{SECTION}.policy="{policy}" needs {SECTION}.{field}, which is not set. {_WORDS[field].remedy}'
        if value is not None and self.policy != policy:
            yield (
                f'{SECTION}.{field}={_shown(value)} is only for {SECTION}.policy="{policy}", and the policy'
                f' is "{self.policy}". Remove {field}, or set the policy to "{policy}".'
            )


def parse_section(section: Mapping[str, Any]) -> SelectionConfig:
    """Return the checked form of a ds_config's ``adagrad_select`` section. The section is not modified.

    Raises ConfigError, naming the field, its value, what is allowed and the remedy.
    """
    problems = section_problems(section)
    if problems:
        raise ConfigError(problems[0])
    return SelectionConfig(**section)


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section that was saved as JSON with the defaults of fields that it lacks: it may be older."""
    whole = {**SelectionConfig().model_dump(mode="json"), **saved}
    for name, kind in _SUB_SECTIONS.items():
        if isinstance(whole[name], Mapping):
            whole[name] = {**kind().model_dump(mode="json"), **whole[name]}
    return whole


def section_problems(section: Mapping[str, Any]) -> list[str]:
    """Return all problems of an ``adagrad_select`` section, unknown keys first; empty if it has none."""
    if not isinstance(section, Mapping):
        return [
            f"{SECTION}={_shown(section)} is not an object. Use {{}} for all defaults, or remove the section"
            " to run plain DeepSpeed."
        ]
    known = {key: value for key, value in section.items() if key in SelectionConfig.model_fields}
    problems = [_unknown_key(key) for key in section if key not in known]
    try:
        SelectionConfig(**known)
    except ConfigErrors as error:
        problems += error.problems
    return problems


def find_section(ds_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the unchecked section of a whole ds_config; None if it has no section.

    Raises ConfigError if the section is no object, and for a top-level key that looks like a misspelt
    section, since DeepSpeed ignores keys that it does not know.
    """
    if SECTION in ds_config:
        section: Mapping[str, Any] = ds_config[SECTION]
        if not isinstance(section, Mapping):
            parse_section(section)  # raises
        return section
    for key in ds_config:
        if isinstance(key, str) and _looks_like_section(key):
            raise ConfigError(
                f'ds_config has the key "{key}", which nothing reads. Did you mean "{SECTION}"? Rename or remove it.'
            )
    return None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return `` Did you mean "x"?`` for the candidate nearest to ``word``; "" if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f' Did you mean "{by_lower[near[0]]}"?' if near else ""


def fraction_hint(select_percent: float) -> str:
    """Return a sentence, after a blank, if ``select_percent`` was probably meant as a fraction; else ""."""
    if select_percent > 1:
        return ""
    return f" It is in percent: for {select_percent:g} of the blocks set it to {100 * select_percent:g}."


def contradiction(names: Iterable[str]) -> str:
    """Return the message for names that are in both always_select and never_select."""
    return (
        f"{SECTION}.always_select and {SECTION}.never_select both name {quoted(names)}. A block is"
        " updated at every step or at none: take it out of one of them."
    )


def quoted(names: Iterable[str]) -> str:
    """Return the names in double quotes, joined by commas."""
    return ", ".join(f'"{name}"' for name in names)


def _looks_like_section(key: str) -> bool:
    letters = re.sub(r"[^a-z0-9]", "", key.lower())
    for name in (SECTION, *_MISTAKEN_SECTIONS):
        if difflib.SequenceMatcher(None, letters, name.replace("_", "")).ratio() >= _SIMILAR:
            return True
    return False


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "auto")


def _shown(value: Any) -> str:
    """Return the value as the user's JSON spells it."""
    return json.dumps(value, default=repr, ensure_ascii=False)


def _unknown_key(key: object, model: type[BaseModel] = SelectionConfig, path: str = SECTION) -> str:
    fields = list(model.model_fields)
    return f"{path} has no field {_shown(key)}.{did_you_mean(str(key), fields)} Its fields: {', '.join(fields)}."


@dataclass(frozen=True)
class _Words:
    """The words of a field's error: what it holds, the remedy, and for a number the range."""

    kind: str
    remedy: str
    allowed: str = ""


_BLOCK_LIST = _Words("a list of block names", 'Write it as ["embedding"], or [] for none.')
_WORDS = {
    "enabled": _Words("true or false", "Use false to run plain DeepSpeed."),
    "preset": _Words(f"one of {quoted(presets.PRESETS)}", "Use null to set the fields yourself."),
    "policy": _Words("a policy's name", 'Use "adagrad_select", or a name that you registered.'),
    "granularity": _Words('"block" or "module"', 'Use "block" to select whole layers, "module" for single matrices.'),
    "select_percent": _Words("a number", "Use 100 to train every block.", "(0, 100]"),
    "select_every": _Words("an integer", "Use 1 to select anew at every step.", "[1, inf)"),
    "explore_rate": _Words("a number", "Use 1 to explore at the first step, 0 to never explore.", "[0, 1]"),
    "explore_decay": _Words("a number", "Use null for ln(100) / steps_per_epoch.", "[0, inf)"),
    "smoothing": _Words("a number", "Use 1.0; less than that favours blocks updated often.", "(0, inf)"),
    "exploit_draw": _Words('"sample" or "top"', 'Use "sample" to draw blocks in proportion to p.'),
    "score": _Words('"sum", "norm" or "rms"', 'Use "sum" for the sum of the norms of a block\'s parameters.'),
    "score_decay": _Words("a number", "Use 0.8; 0 forgets all but the newest period.", "[0, 1)"),
    "temperature": _Words("a number", "Use 1.0; less than that favours high scores more.", "(0, inf)"),
    "refresh_every": _Words("an integer", "Use null for a period as long as a selection stands.", "[1, inf)"),
    "probe_steps": _Words("an integer", "Use 5; these steps score every block and update none.", "[1, inf)"),
    "always_select": _BLOCK_LIST,
    "never_select": _BLOCK_LIST,
    "steps_per_epoch": _Words(
        "an integer", "Use the optimizer steps in one pass over the data, or null to count them.", "[1, inf)"
    ),
    "seed": _Words("an integer", "Use 42, or any integer from 0 on.", "[0, inf)"),
    "step_device": _Words(
        '"cpu", "accelerator" or null', "Use null to follow offload_optimizer and the memory there is."
    ),
    "keep_master": _Words('"host" or "accelerator"', 'Use "host": master weights travel with the moments.'),
    "state_budget_bytes": _Words("an integer", "Use null for the largest selection and two blocks more.", "[1, inf)"),
    "state_dtype": _Words('"fp32", "bf16" or "int8"', 'Use "fp32": moments rest as they are updated.'),
    "master_weights": _Words('"fp32" or "split"', 'Use "fp32": master weights rest as they are updated.'),
    "on_reentry": _Words('"keep", "reset" or "decay"', 'Use "keep": moments wait for the next update of their block.'),
    "explore_on": _Words('"batch" or "first_micro_batch"', 'Use "batch" to score the whole batch\'s gradient.'),
    "blocks": _Words(
        "a map from block name to a list of regular expressions",
        'Write it as {"embedding": ["wte\\\\.weight"], ...}, or null for the automatic blocks.',
    ),
    "fixed_blocks": _Words("a list of block names", 'Write it as ["embedding", "head"].'),
    "replay_file": _Words("a path", "Use the path of an earlier run's selection.jsonl."),
    "gast": _Words("an object", "Use {} for all its defaults, or null to learn from all rows."),
    "gast.select_samples": _Words("an integer", "Use null for half of the micro-batch.", "[1, inf)"),
    "gast.support": _Words('"batch" or "data"', 'Use "batch" to score rows against the rest of the micro-batch.'),
    "gast.support_samples": _Words("an integer", "Use 4, or any number of rows of support data.", "[1, inf)"),
    "gast.draw": _Words('"sample", "random" or "top"', 'Use "sample" to draw rows in proportion to their alignment.'),
    "sparse_grad": _Words("an object", "Use {} for all its defaults, or null to train whole matrices."),
    "sparse_grad.entries_percent": _Words("a number", "Use 1 to train one percent of the entries.", "(0, 100]"),
    "sparse_grad.modules": _Words(
        "a list of regular expressions over parameter names",
        'Write it as [".*\\.up_proj\\.weight"], or null for the matrices of the MLPs.',
    ),
    "sparse_grad.rotation": _Words('"model", "both" or "none"', 'Use "model" to rotate the side of the hidden size.'),
    "sparse_grad.basis": _Words('"matrix" or "kind"', 'Use "matrix" to give each matrix a basis of its own.'),
    "sparse_grad.choice": _Words('"energy" or "random"', 'Use "energy" for the entries with the most energy.'),
    "sparse_grad.calibration_steps": _Words("an integer", "Use 10; they change no weight.", "[1, inf)"),
    "sparse_grad.refresh_steps": _Words("an integer", "Use null to choose the entries once.", "[1, inf)"),
    "sparse_grad.lr_scale": _Words("a number", "Use null for 5 at 1 % of the entries.", "(0, inf)"),
}


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def _messages(error: ValidationError, given: Mapping[str, Any]) -> list[str]:
    messages: list[str] = []
    for found in error.errors(include_url=False):
        raised = found.get("ctx", {}).get("error")
        messages += raised.problems if isinstance(raised, ConfigErrors) else [_message(found, given)]
    return list(dict.fromkeys(messages))  # a list of block names has an error for each item


def _message(found: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    field = str(found["loc"][0])
    value = given.get(field)
    if field in _SUB_SECTIONS and len(found["loc"]) > 1:
        key = str(found["loc"][1])
        if found["type"] == "extra_forbidden":
            return _unknown_key(key, _SUB_SECTIONS[field], f"{SECTION}.{field}")
        field, value = f"{field}.{key}", given[field][key]
    if found["type"] == "extra_forbidden":
        return _unknown_key(field)
    words = _WORDS[field]
    out_of_range = found["type"] in _OUT_OF_RANGE
    problem = f"is outside {words.allowed}" if out_of_range else f"is not {words.kind}"
    return f"{SECTION}.{field}={_shown(value)} {problem}. {words.remedy}"


def _pattern_problems(blocks: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if not blocks:
        yield f"{SECTION}.blocks={{}} is empty. Use null for the automatic blocks."
    for name, patterns in blocks.items():
        if not patterns:
            yield f'{SECTION}.blocks["{name}"]=[] is empty. Give it a regular expression, or remove it.'
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield (
                    f'{SECTION}.blocks["{name}"] has the pattern {_shown(pattern)}, which is not a regular '
                    f'expression: {error}. Escape special characters, as in "layers\\\\.0\\\\..*".'
                )
