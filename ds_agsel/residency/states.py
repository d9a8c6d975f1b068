"""The parts of an optimizer state, where a block's state is, and which transitions between places are allowed."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ds_agsel.errors import TrainingError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = (MASTER, *MOMENTS)


class Residency(enum.Enum):
    """Where the master weights and moments of a block are; their bytes count on the accelerator in all but the first.

    ON_HOST: in pinned host memory alone. Costs the accelerator nothing.
    ARRIVING: memory on the accelerator is taken, the copy H2D is under way. Costs the block's whole state.
    RESIDENT: usable on the accelerator; an update makes the host's copy stale. Costs the block's whole state.
    LEAVING: the copy D2H is under way; the memory is freed, in stream order, when it has passed. Costs the
        block's whole state until then.
    """

    ON_HOST = "on host"
    ARRIVING = "arriving"
    RESIDENT = "resident"
    LEAVING = "leaving"


_NEXT = {
    Residency.ON_HOST: (Residency.ARRIVING,),
    Residency.ARRIVING: (Residency.RESIDENT,),
    Residency.RESIDENT: (Residency.LEAVING,),
    Residency.LEAVING: (Residency.ON_HOST,),
}


@dataclass
class BlockResidency:
    """A block's place, changed only along ON_HOST → ARRIVING → RESIDENT → LEAVING → ON_HOST.

    ``host_is_stale``: the accelerator's copy has been updated since the host's was written.
    """

    block: int
    place: Residency = Residency.ON_HOST
    host_is_stale: bool = False

    def become(self, place: Residency) -> None:
        """Change place. Raises TrainingError if the transition is not allowed."""
        if place not in _NEXT[self.place]:
            raise TrainingError(f"block {self.block} can't become {place.value}: it is {self.place.value}.")
        if place is Residency.ON_HOST and self.host_is_stale:
            raise TrainingError(f"block {self.block} can't leave: the host's copy of its state is stale.")
        self.place = place

    def updated(self) -> None:
        """Note an update on the accelerator. Raises TrainingError unless the block is resident."""
        if self.place is not Residency.RESIDENT:
            raise TrainingError(f"block {self.block} can't be updated: it is {self.place.value}, not resident.")
        self.host_is_stale = True
