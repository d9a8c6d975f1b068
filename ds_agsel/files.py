"""Files that hold either their old content or all of the new one, and names that stay inside their folder."""

from __future__ import annotations

import os
from pathlib import Path


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name``, which a file gave, in ``folder``; the file need not exist.

    Raises ValueError if ``name`` is absolute, has ``..`` or empty parts, or passes through a link below ``folder``.
    Use it for every path that is read out of a file, before that path is opened, changed or removed.
    """
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") or Path(part).drive for part in parts):
        raise ValueError(f"{name!r} lies outside {folder}")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{name} is reached through the link {path}, and links are not followed")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old content or all of the new one, also after a power cut.

    A link at ``path`` is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a killed process of the same number left it
        with open(temporary, "x", encoding="utf-8") as file:  # "x" follows no link
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush ``folder`` itself, so that created, renamed and removed files outlast a power cut, if the system can."""
    if os.name != "posix":
        return  # a folder can't be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
