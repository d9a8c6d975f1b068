"""Exchanges between the ranks of a save or a load, so that all succeed or all raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepspeed import comm as dist

from ds_agsel.errors import AgselError, CheckpointError
from ds_agsel.zero import compat


@dataclass(frozen=True)
class Place:
    """This rank among the ``count`` that see the same checkpoint folder: the ``index``-th, after rank ``leader``."""

    leader: int
    index: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this rank acts for its group."""
        return self.index == 0

    @classmethod
    def of(cls, engine: compat.DeepSpeedEngine) -> Place:
        """Return this rank's place. Collective."""
        if not engine.use_node_local_storage():
            return cls(0, engine.global_rank, dist.get_world_size())
        leader = engine.global_rank - int(engine.local_rank)
        return cls(leader, int(engine.local_rank), gather(leader).count(leader))


def gather(item: Any) -> list[Any]:
    """Return every rank's ``item``, by rank. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found


def of_rank_0(look: Callable[[], Any]) -> Any:
    """Return or raise what ``look()`` gives or raises on rank 0, the only one to call it. Collective."""
    answer: Any = None
    if dist.get_rank() == 0:
        try:
            answer = look()
        except (CheckpointError, OSError) as error:
            answer = CheckpointError(str(error))
    answer = gather(answer)[0]
    if isinstance(answer, CheckpointError):
        raise answer
    return answer


class Errors:
    """The errors that this rank met.

    They are kept, not raised: if one rank raised, the others would wait for it at a barrier.
    """

    def __init__(self) -> None:
        self._message: str | None = None

    def attempt(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``work(...)``, or None if it fails or an earlier attempt has failed."""
        if self._message is not None:
            return None
        try:
            return work(*args, **kwargs)
        except Exception as error:  # any error of a client_state, a policy or a scheduler while it is saved
            self.note(str(error) if isinstance(error, AgselError) else f"{type(error).__name__}: {error}")
            return None

    def note(self, message: str) -> None:
        """Keep ``message`` as an error of this rank."""
        self._message = self._message or message

    def first_of_all_ranks(self) -> str | None:
        """Return the error of the first rank that has one; None if none has. Collective."""
        found = gather(self._message)
        rank = next((rank for rank, message in enumerate(found) if message is not None), None)
        if rank is None:
            return None
        others = len(found) > 1 and found.count(found[rank]) < len(found)
        return f"{found[rank].rstrip('.')}{f' (on rank {rank})' if others else ''}"
