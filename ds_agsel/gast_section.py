"""The sub-section ``gast`` of ``adagrad_select``: fields and ranges. Its errors are told by config.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

GAST = "gast"


class GastConfig(BaseModel):
    """The checked sub-section. docs/gast.md has the fields' meaning.

    Attributes:
        select_samples: K, the rows of a micro-batch that a block learns from; None: half of them, rounded up.
        support: whose gradient scores a row: that of the other half of the micro-batch, or of `support_data`.
        support_samples: rows of support data at each step.
        draw: in proportion to softmax(z), uniformly and without scores, or the highest scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    select_samples: int | None = Field(None, ge=1)
    support: Literal["batch", "data"] = "batch"
    support_samples: int = Field(4, ge=1)
    draw: Literal["sample", "random", "top"] = "sample"

    @property
    def needs_support_data(self) -> bool:
        """Whether rows are scored against data that the user gives."""
        return self.support == "data"

    def problems(self, section: str) -> Iterator[str]:
        """Yield a line for each combination that can't work; ``section`` is the path of this sub-section."""
        if self.needs_support_data and self.draw == "random":
            yield (
                f'{section}.support="data" and {section}.draw="random" exclude each other: random rows need no '
                f'support. Remove {section}.support, or use draw "sample".'
            )
