"""One validated reader for the JSON beside a checkpoint: the manifest and the selection's state.

Needs neither torch nor deepspeed. An invalid field is a CheckpointError that names it. [Note: Signed manifests] A
sha256 finds damage; it does not stop anyone who can write to the folder, for they can write a fitting sha256 too. With
the environment variable `KEY_VARIABLE` set, manifests also carry an HMAC-SHA256 by that key, and only those load.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError, model_validator

from ds_agsel.errors import CheckpointError

KEY_VARIABLE = "DS_AGSEL_CHECKPOINT_KEY"
MANIFEST_VERSION = 1
STATE_VERSIONS = (1, 2)  # versions that can be read; the last is written. 1 has the whole history and no step counts.
DIGEST_KEY, SIGNATURE_KEY = "sha256", "hmac_sha256"

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Digest = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
Phase = Literal["explore", "exploit"]
Model = TypeVar("Model", bound=BaseModel)


def parse_json(text: str) -> Any:
    """Parse the JSON ``text``. Raises ValueError, also for deep nesting, NaN and infinity."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def validated(model: type[Model], content: Any, source: str) -> Model:
    """Return ``content`` as ``model``. Raises CheckpointError that names ``source`` and the first wrong field."""
    try:
        return model.model_validate(content)
    except RecursionError:
        raise CheckpointError(f"{source} is nested too deeply") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        value = f", not {first['input']!r:.80}" if field and not isinstance(first["input"], dict) else ""
        raise CheckpointError(f"{source}: {f'{field}: ' if field else ''}{first['msg']}{value}") from None


# -------------------------------------------------------------------- manifests


class _File(BaseModel):
    bytes: Count
    sha256: Digest


class _Facts(BaseModel):
    """What is known about the run. Every one may be missing: `checkpoints.seal` knows none of them."""

    model_config = ConfigDict(extra="allow")

    world_size: Count | None = None
    stage: Annotated[int, Field(strict=True, ge=0, le=3)] | None = None
    steps: Count | None = None
    dtype: StrictStr | None = None
    layout_sha256: Digest | None = None
    section_sha256: Digest | None = None
    versions: dict[str, StrictStr] | None = None
    run: StrictStr | None = None
    ancestors: list[StrictStr] | None = None


class _Manifest(_Facts):
    version: Literal[1]
    order: Count
    files: dict[str, _File]


@dataclass(frozen=True)
class Manifest:
    """What a whole tag holds.

    ``files``: path in the tag's folder -> (bytes, sha256). ``order``: later saves to one folder have higher ones.
    ``facts``: of the run: world_size, stage, dtype, steps, section_sha256, versions, run, ancestors.
    """

    files: dict[str, tuple[int, str]]
    order: int
    facts: dict[str, Any]


def manifest_text(files: Mapping[str, tuple[int, str]], order: int, facts: Mapping[str, Any]) -> str:
    """Return a manifest that checks itself, signed where `KEY_VARIABLE` is set."""
    content: dict[str, Any] = {
        **facts,
        "version": MANIFEST_VERSION,
        "order": order,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
    }
    key = signing_key()
    if key is not None:
        content[SIGNATURE_KEY] = _signature(key, content)
    return json.dumps({**content, DIGEST_KEY: _sha256(content)}, indent=1)


def read_manifest_text(text: str, source: str) -> Manifest:
    """Return the manifest in ``text``. Raises CheckpointError for a damaged one or a missing or wrong signature."""
    try:
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        expected = content.pop(DIGEST_KEY, None)
        if _sha256(content) != expected:
            raise ValueError("it does not have the sha256 it names")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None
    signature = content.pop(SIGNATURE_KEY, None)
    version = content.get("version")
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{source} has version={version!r:.80}; this ds_agsel reads {MANIFEST_VERSION}, another one wrote it"
        )
    _check_signature(content, signature, source)
    manifest = validated(_Manifest, content, source)
    files = {name: (file.bytes, file.sha256) for name, file in manifest.files.items()}
    facts = manifest.model_dump(exclude={"version", "order", "files"}, exclude_unset=True)
    return Manifest(files, manifest.order, facts)


def signing_key() -> bytes | None:
    """Return the key of [Note: Signed manifests]; None if none is set. Raises CheckpointError for an empty one."""
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key:
        raise CheckpointError(f"{KEY_VARIABLE} is set and empty. Set it to the key of your checkpoints, or unset it.")
    return key.encode()


def _check_signature(content: Mapping[str, Any], signature: Any, source: str) -> None:
    key = signing_key()
    if key is None:
        return
    if not isinstance(signature, str):
        raise CheckpointError(
            f"{source} is not signed, and {KEY_VARIABLE} is set. Unset it to load a checkpoint that you trust anyway; "
            "the next save signs"
        )
    if not hmac.compare_digest(signature.encode(), _signature(key, content).encode()):
        raise CheckpointError(f"{source} does not fit the key in {KEY_VARIABLE}: it was changed, or the key is another")


def _signature(key: bytes, content: Mapping[str, Any]) -> str:
    return hmac.new(key, _canonical(content), hashlib.sha256).hexdigest()


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


# ---------------------------------------------------- markers of saves under way


class SavingMarker(BaseModel):
    """The marker in a folder that is being saved to: the saving run, and whether the folder was empty before."""

    run: StrictStr = ""
    is_new: StrictBool = False

    @classmethod
    def parse(cls, text: str) -> SavingMarker:
        """Return the marker in ``text``. A damaged one belongs to no run: the folder it marks is left alone."""
        if not text:
            return cls(is_new=True)  # of an older ds_agsel
        try:
            return cls.model_validate(parse_json(text))
        except (ValueError, RecursionError):
            return cls()


# ------------------------------------------------------------- selection's state


class PlanState(BaseModel):
    """A `selection.Plan`."""

    step: Count
    phase: Phase
    blocks: list[Count] | None


class RoundState(BaseModel):
    """A `selection.Round`."""

    start: Count
    blocks: list[Count]


class SelectionState(BaseModel):
    """What `Selection.state_dict` gives, of any version that is read, consistent in itself."""

    version: Literal[1, 2]
    blocks: list[tuple[StrictStr, list[StrictStr]]]
    section: dict[str, Any]
    update_counts: list[Count]
    history: list[tuple[Count, Phase, list[Count]]]
    plan: PlanState | None
    policy: dict[str, Any]
    round: RoundState | None = None
    explore_steps: Count = 0
    exploit_steps: Count = 0
    last_updates: list[Count | None] | None = None  # missing in states that an older ds_agsel saved

    @property
    def num_steps(self) -> int:
        """How many optimizer steps were applied."""
        return self.explore_steps + self.exploit_steps

    @model_validator(mode="after")
    def _is_consistent(self) -> SelectionState:
        if self.version == 1:
            self.explore_steps = sum(phase == "explore" for _, phase, _ in self.history)
            self.exploit_steps = len(self.history) - self.explore_steps
        steps, num_blocks = self.num_steps, len(self.blocks)
        if len(self.update_counts) != num_blocks:
            raise ValueError(f"update_counts has {len(self.update_counts)} counts for {num_blocks} blocks")
        for block, count in enumerate(self.update_counts):
            if count > steps:
                raise ValueError(f"update_counts.{block} is {count}, more than the {steps} steps that were applied")
        self._check_last_updates()
        first = self._first_step()
        for row, (step, _, blocks) in enumerate(self.history):
            if step != first + row:
                raise ValueError(f"history.{row} is step {step}, not {first + row}: {steps} steps were applied")
            _check_blocks(f"history.{row}", blocks, num_blocks)
        if self.plan is not None:
            if self.plan.step != steps:
                raise ValueError(f"plan.step is {self.plan.step}, and {steps} steps were applied")
            if (self.plan.blocks is None) != (self.plan.phase == "explore"):
                raise ValueError("plan.blocks is null for a step that explores, and for no other")
            _check_blocks("plan.blocks", self.plan.blocks or [], num_blocks)
        if self.round is not None:
            if self.round.start >= steps:
                raise ValueError(f"round.start is {self.round.start}, and {steps} steps were applied")
            _check_blocks("round.blocks", self.round.blocks, num_blocks)
        return self

    def _check_last_updates(self) -> None:
        if self.last_updates is None:
            return
        if len(self.last_updates) != len(self.blocks):
            raise ValueError(f"last_updates has {len(self.last_updates)} steps for {len(self.blocks)} blocks")
        for block, (last, count) in enumerate(zip(self.last_updates, self.update_counts)):
            if (last is None) != (count == 0) or (last is not None and not count - 1 <= last < self.num_steps):
                raise ValueError(
                    f"last_updates.{block} is {last}, and the block was updated {count} times in {self.num_steps} steps"
                )

    def last_update(self, block: int) -> int | None:
        """Return the step that updated ``block`` last; None if none did.

        Of an older state as the history tells; for a block that is not in it, the step before the history.
        """
        if self.last_updates is not None:
            return self.last_updates[block]
        if not self.update_counts[block]:
            return None
        return next((step for step, _, blocks in reversed(self.history) if block in blocks), self._first_step() - 1)

    def _first_step(self) -> int:
        return self.num_steps - len(self.history)


def _check_blocks(field: str, blocks: list[int], num_blocks: int) -> None:
    if any(block >= num_blocks for block in blocks) or any(a >= b for a, b in pairwise(blocks)):
        raise ValueError(f"{field} has {blocks!r:.80}, which are not ascending indices of the {num_blocks} blocks")


def read_selection_state(content: Any, source: str) -> SelectionState:
    """Return the parsed ``content`` as a validated state. Raises CheckpointError naming the field."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} is not a JSON object")
    version = content.get("version")
    if type(version) is not int or version not in STATE_VERSIONS:
        raise CheckpointError(
            f"{source} has version={version!r:.80}; this ds_agsel reads versions {STATE_VERSIONS[0]} to "
            f"{STATE_VERSIONS[-1]}. Load it with the ds_agsel that wrote it, or load the weights alone: "
            "load_module_only=True."
        )
    return validated(SelectionState, content, source)
