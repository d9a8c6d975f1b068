"""Which run a tag belongs to, so that runs that share a checkpoint folder never remove each other's tags.

[Note: Whose tag] Each run has an id of its own, and each tag says the id of the run that saved it. A run clears up
after itself, and, as it alone holds the folder's lock, after the runs whose checkpoints it goes on from. The lock is
the kernel's (flock): a run that was killed no longer holds it. Where a file system has no such locks, a run removes
its own tags alone.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("ds_agsel")

LOCK_FILE = ".ds_agsel.lock"
_KEPT_ANCESTORS = 100


class Run:
    """One run, from the start of its process to the end. Ids are 32 hexadecimal digits; "" is an older ds_agsel's."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.ancestors: tuple[str, ...] = ()
        self._locks: dict[Path, int] = {}

    def go_on_from(self, facts: Mapping[str, Any]) -> None:
        """Take over from the run that saved a tag with these ``facts``, which was loaded."""
        found = (*(facts.get("ancestors") or ()), facts.get("run") or "")
        self.ancestors = tuple(dict.fromkeys(name for name in found if name != self.id))[-_KEPT_ANCESTORS:]

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of this run."""
        return {"run": self.id, "ancestors": list(self.ancestors)}

    def may_remove(self, directory: Path, run: str | None) -> bool:
        """Return whether a tag that ``run`` saved in ``directory`` is this run's to remove."""
        if run == self.id:
            return True
        return (run or "") in self.ancestors and self._holds_lock(directory)

    def claim(self, directory: Path) -> None:
        """Take the lock of ``directory`` where it is free, and keep it until `release`."""
        self._holds_lock(directory)

    def release(self) -> None:
        """Give back every lock."""
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks = {}

    def __del__(self) -> None:
        self.release()

    def _holds_lock(self, directory: Path) -> bool:
        directory = directory.resolve()
        if directory not in self._locks:
            descriptor = _lock(directory / LOCK_FILE)
            if descriptor is None:
                return False
            self._locks[directory] = descriptor
        return True


def _lock(path: Path) -> int | None:
    """Return the descriptor of ``path``, locked; None if another has the lock or there are no locks."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            logger.warning("adagrad_select: %s can't be locked (%s): old tags of earlier runs are kept.", path, error)
        return None
    return descriptor
