"""The matrices of which some entries are trained: read from sparse_grad.json, which `SelectionLog` writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_agsel.report.text import printable

MATRICES_FILE = "sparse_grad.json"
MAX_MATRICES = 2**16


@dataclass(frozen=True)
class Matrix:
    """One matrix, as it was when its entries were last chosen; `ds_agsel.sparse.record.MatrixRecord` has the meaning.

    ``reach``: how many of its lines have more than 0, 1, 2, 4, … entries.
    """

    name: str
    entries: int
    numel: int
    lines: int
    captured: float
    captured_plain: float
    chosen: int
    reach: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The name of the Linear: what matrices of all layers have in common."""
        return re.sub(r"\d+", "*", self.name).removesuffix(".weight").rpartition("*.")[2]


def as_json(records: Any) -> dict[str, Any]:
    """Return what sparse_grad.json has of ``records``, by the matrices' names; those not chosen yet are left out."""
    return {
        "matrices": [
            {"name": name, **asdict(record)} for name, record in records.items() if record.captured is not None
        ]
    }


def read_matrices(described: Any) -> list[Matrix]:
    """Return the matrices in the content of sparse_grad.json. Raises ValueError for a wrong one."""
    try:
        found = [_matrix(matrix) for matrix in described["matrices"][:MAX_MATRICES]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{error!r}") from None
    return found


def _matrix(described: Any) -> Matrix:
    reach = tuple(described["reach"])
    whole = {name: described[name] for name in ("entries", "numel", "lines", "chosen")}
    shares = {name: described[name] for name in ("captured", "captured_plain")}
    if any(type(value) is not int or not 0 <= value < 2**53 for value in (*whole.values(), *reach)):
        raise ValueError(f"{described!r:.80} has a count that is none")
    if whole["lines"] == 0 or any(count > whole["lines"] for count in reach) or not 0 < len(reach) < 64:
        raise ValueError(f"{described!r:.80} has more lines than it has")
    if any(type(value) not in (int, float) or not 0 <= value <= 1.001 for value in shares.values()):
        raise ValueError(f"{described!r:.80} has a share outside [0, 1]")
    return Matrix(name=printable(str(described["name"])), **whole, **shares, reach=reach)


def by_kind(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Return the matrices by kind, in their order."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(matrix.kind, []).append(matrix)
    return kinds
