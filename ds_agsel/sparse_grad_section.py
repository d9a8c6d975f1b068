"""The ``sparse_grad`` sub-section of the ``adagrad_select`` section: which entries are trained, in which basis."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

SPARSE_GRAD = "sparse_grad"


class SparseGradConfig(BaseModel):
    """The checked sub-section of SparseGrad (arXiv:2410.07383). docs/section.md has the fields' meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    entries_percent: float = Field(1.0, gt=0, le=100)
    modules: tuple[str, ...] | None = None
    rotation: Literal["model", "both", "none"] = "model"
    basis: Literal["matrix", "kind"] = "matrix"
    choice: Literal["energy", "random"] = "energy"
    calibration_steps: int = Field(10, ge=1)
    refresh_steps: int | None = Field(50, ge=1)
    lr_scale: float | None = Field(None, gt=0)

    @field_validator("modules", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def lr_factor(self) -> float:
        """The factor on the learning rate of the trained entries: `lr_scale`, by default 5 at 1 %."""
        return 0.5 * math.sqrt(100 / self.entries_percent) if self.lr_scale is None else self.lr_scale

    def problems(self, path: str) -> Iterator[str]:
        """Yield what is wrong with the fields together, and with the patterns; ``path`` names the sub-section."""
        if self.basis == "kind" and self.refresh_steps is not None:
            yield (
                f'{path}.basis="kind" shares one basis among all blocks, and {path}.refresh_steps={self.refresh_steps}'
                ' gives each block a new one by its own clock. Set refresh_steps to null, or basis to "matrix".'
            )
        if self.choice == "random" and self.rotation != "none":
            yield (
                f'{path}.choice="random" draws entries of the plain matrix, and {path}.rotation="{self.rotation}"'
                ' rotates it. Set rotation to "none", or choice to "energy".'
            )
        if self.modules == ():
            yield f"{path}.modules=[] is empty. Use null for the matrices of the MLPs."
        for pattern in self.modules or ():
            try:
                re.compile(pattern)
            except re.error as error:
                yield (
                    f'{path}.modules has the pattern "{pattern}", which is not a regular expression: {error}. Escape '
                    'special characters, as in ".*\\\\.up_proj\\\\.weight".'
                )
