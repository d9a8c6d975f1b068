"""Read DeepSpeed's files of one tag: only those that its manifest lists, and only classes that a checkpoint needs.

[Note: A checkpoint runs no code] DeepSpeed 0.19.8 unpickles its files (torch_checkpoint_engine.py:37), and a pickle can
call anything. Here they are read with ``weights_only=True`` and the classes of `allowed_classes`. A client_state with
other classes loads once they are declared with `torch.serialization.add_safe_globals`, or with the environment variable
`TRUST_VARIABLE` set to 1, which runs whatever code the files contain.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_agsel import checkpoints
from ds_agsel.errors import CheckpointError
from ds_agsel.files import inside
from ds_agsel.zero.compat.stored import STORED_CLASSES

TRUST_VARIABLE = "DS_AGSEL_TRUST_CHECKPOINTS"
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@cache
def allowed_classes() -> tuple[Any, ...]:
    """Return what the files may hold beside tensors and Python's plain types: DeepSpeed's own, and numpy's arrays."""
    array, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return (*STORED_CLASSES, Counter, defaultdict, np.ndarray, np.dtype, array, scalar, *sorted(dtypes, key=repr))


def trusts_checkpoints() -> bool:
    """Return whether the user lets checkpoints run code. Raises CheckpointError for a value that is not 0 or 1."""
    value = os.environ.get(TRUST_VARIABLE, "0")
    if value not in ("0", "1"):
        raise CheckpointError(f"{TRUST_VARIABLE}={value!r}: allowed are 0, and 1, which lets checkpoints run code.")
    return value == "1"


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Inside, every `torch.load` in this process, DeepSpeed's too, reads as in [Note: A checkpoint runs no code]."""
    if trusts_checkpoints():
        yield
        return
    before = torch.serialization.get_safe_globals()
    environment = {name: os.environ.get(name) for name in (_FORCE, _FORCE_NOT)}
    torch.serialization.add_safe_globals(list(allowed_classes()))
    os.environ.pop(_FORCE_NOT, None)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class TagFiles:
    """The files of the tag in ``folder``. If it has a manifest, only the files listed there exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = checkpoints.read_manifest(folder) if checkpoints.has_manifest(folder) else None

    def has(self, name: str) -> bool:
        """Return whether the tag has the file ``name``."""
        if self.manifest is not None and name not in self.manifest.files:
            return False
        try:
            return inside(self.folder, name).is_file()
        except ValueError:
            return False

    def names(self, pattern: str) -> list[str]:
        """Return the names of the files directly in the folder that fit ``pattern``."""
        return [path.name for path in sorted(self.folder.glob(pattern)) if self.has(path.name)]

    def load(self, name: str | os.PathLike[str], lazily: bool = True) -> Any:
        """Return what `torch.save` wrote, on the host; ``lazily``: tensors stay on disk until they are read.

        ``name``: in the folder, or a path that leads there. Raises CheckpointError for a file that is missing or not
        the tag's, that can't be read, or that needs a class which is not allowed.
        """
        path = Path(name)
        short = path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.as_posix()
        if not self.has(short):
            raise CheckpointError(f"{self.folder} has no {short}. Load it with the ds_config it was saved with.")
        path = inside(self.folder, short)
        mapped = lazily and zipfile.is_zipfile(path)  # torch's older form can't be mapped
        try:
            with restricted_unpickling():
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=not trusts_checkpoints())
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} {_why_refused(error)}") from None
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read ({error}). Load an earlier checkpoint with tag=.") from error


def _why_refused(error: pickle.UnpicklingError) -> str:
    found = re.search(r"(?:GLOBAL|class) ([\w.]*\w)", str(error))
    if found is None:
        why = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        return (
            f"is not a file that torch.save wrote ({why.splitlines()[0]:.200}). Load an earlier checkpoint with tag=."
        )
    return (
        f"holds {found.group(1)}, which is not a class that checkpoints may hold: a file can run code through it. If "
        "you trust its origin, declare that class with torch.serialization.add_safe_globals before loading, or set "
        f"{TRUST_VARIABLE}=1, which runs whatever code the file contains."
    )
