"""Whole checkpoints: the manifest of a tag's files, written last. Needs neither torch nor deepspeed.

Nothing that a file says is opened, changed or removed unless `files.inside` finds it in the tag's own folder.

[Note: A whole tag] A tag is whole when its manifest, which checks itself, is there and every file it lists has the
size and sha256 it had when it was saved. While a tag is being saved it holds `SAVING_FILE`. The manifest is written
(temporary file, fsync, rename) once every file is on disk, then `latest`. At any moment of a save, and after
a kill or a power cut, the earlier tags are therefore whole, and this one is whole or known not to be. A whole tag
that is overwritten waits under another name until the new one is whole.

[Note: Unverifiable tags] A tag of plain DeepSpeed has neither file. Its weights load, with a warning, if it is named
by hand or by `latest`; no fallback chooses it and pruning leaves it. A tag of ours without a manifest, which an older
ds_agsel may have written, is refused; `seal` gives it one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_agsel.errors import CheckpointError
from ds_agsel.files import inside, sync_folder, write_atomically
from ds_agsel.metadata import (
    STATE_VERSIONS,
    Manifest,
    SavingMarker,
    SelectionState,
    manifest_text,
    parse_json,
    read_manifest_text,
    read_selection_state,
)
from ds_agsel.tag_owner import Run

MANIFEST_FILE = "manifest.json"
STATE_FILE = "adagrad_select.json"
SAVING_FILE = ".saving"
LATEST_FILE = "latest"
LATEST_UNIVERSAL_FILE = "latest_universal"  # of DeepSpeed's converter
_CHUNK_BYTES = 1 << 22
_LISTED = 5  # problems that a message names


def folder_of(directory: str | os.PathLike[str], tag: str) -> Path:
    """Return the folder of ``tag`` in ``directory``. Raises CheckpointError for a tag that leads out of it."""
    base = Path(directory)
    if not tag or tag in (".", "..") or Path(tag).name != tag or "\\" in tag:
        raise CheckpointError(
            f"checkpoint tag {tag!r} is not the name of a folder in {base}. Use a name without slashes, such as "
            "'global_step10'."
        )
    folder = base / tag
    if folder.is_symlink() and folder.resolve().parent != base.resolve():
        raise CheckpointError(
            f"checkpoint {folder} is a link to {folder.resolve()}, outside {base}. Load it from the folder it lies in."
        )
    return folder


# ---------------------------------------------------------------------- writing


def entry_of(path: Path) -> tuple[int, str]:
    """Return (bytes, sha256) of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def entries(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Return the manifest's entries for ``paths`` in ``folder``. Each file is flushed to disk and read back."""
    found = {}
    for path in paths:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
        found[path.relative_to(folder).as_posix()] = entry_of(path)
    return found


def make_room(folder: Path, run: Run) -> None:
    """Make ``folder`` ready to be saved to. A whole tag there waits under another name for `settle` or `give_up`.

    No rank may still read the tag that is there. Raises CheckpointError if ``folder`` is a link or has links in it,
    through which a save would write elsewhere.
    """
    aside = _aside(folder)
    for path in (folder, aside):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link, and links are not followed. Save under another tag, or remove it")
    if aside.exists() and not has_manifest(folder):  # a save over it was killed
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    if folder.name in _manifests(folder.parent):
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    existed = folder.exists()
    links = [path for path in folder.rglob("*") if path.is_symlink()] if existed else []
    if links:
        raise CheckpointError(f"{links[0]} is a link, and links are not followed. Save under another tag, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    marker = SavingMarker(run=run.id, is_new=not existed)
    write_atomically(folder / SAVING_FILE, marker.model_dump_json())
    (folder / MANIFEST_FILE).unlink(missing_ok=True)  # a damaged one
    sync_folder(folder.parent)


def write_manifest(folder: Path, files: Mapping[str, tuple[int, str]], facts: Mapping[str, Any]) -> None:
    """Declare ``folder`` whole. Raises CheckpointError if a file is missing: the folder is not shared by all ranks.

    Every file must be on disk (`entries`). Files in ``folder`` that ``files`` lacks belong to others. The marker of the
    save stays until `settle`, so that `give_up` can still undo it.
    """
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"a rank wrote {name} ({size} bytes), which this one does not see in {folder}. Save to a folder that "
                "all nodes share, or set checkpoint.use_node_local_storage=true."
            )
    order = 1 + max((manifest.order for manifest in _manifests(folder.parent).values()), default=0)
    write_atomically(folder / MANIFEST_FILE, manifest_text(files, order, facts))


def seal(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Declare ``folder`` whole as it is now: every file in it, from any writer, except links."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name not in (MANIFEST_FILE, SAVING_FILE)
    ]
    write_manifest(folder, entries(folder, files), facts or {})
    (folder / SAVING_FILE).unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Remove the tag that the whole ``folder`` replaces, and keep the files that others put there."""
    aside = _aside(folder)
    if aside.exists():
        ours = read_manifest(aside).files
        for path in [path for path in aside.rglob("*") if not path.is_dir()]:
            name = path.relative_to(aside)
            if name.as_posix() not in (*ours, MANIFEST_FILE) and not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.rename(folder / name)
        _remove(aside)
    (folder / SAVING_FILE).unlink(missing_ok=True)


def give_up(folder: Path) -> None:
    """Undo `make_room` after a save that failed: remove what it wrote, put back what it was to replace."""
    if folder.is_symlink():
        return  # `make_room` refused it
    if (folder / SAVING_FILE).exists() and _marker(folder).is_new:  # else others' files were there: all of it stays
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
    if _aside(folder).exists() and not folder.exists():
        _aside(folder).rename(folder)


def write_latest(directory: Path, tag: str) -> None:
    """Let ``latest`` name ``tag``, which must be whole."""
    write_atomically(directory / LATEST_FILE, tag)


def prune(directory: Path, keep: int, run: Run) -> list[str]:
    """Remove all but the ``keep`` newest tags of ``run``, and what its killed saves left; return the removed tags.

    Call it once the newest tag is verified. Tags of other runs stay ([Note: Whose tag] in `tag_owner`), and so do
    links and files that no manifest lists.
    """
    run.claim(directory)
    found, removed = _manifests(directory), []
    own = [tag for tag in _newest_first(found) if run.may_remove(directory, found[tag].facts.get("run"))]
    for tag in [tag for tag in own if not (directory / tag).is_symlink()][max(1, keep) :]:
        _remove(directory / tag)
        removed.append(tag)
    for marker in directory.glob(f"*/{SAVING_FILE}"):
        folder = marker.parent
        if folder.is_symlink() or has_manifest(folder) or _aside(folder).exists():
            continue
        left = _marker(folder)
        if left.is_new and run.may_remove(directory, left.run):
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


# ---------------------------------------------------------------------- reading


def has_manifest(folder: Path) -> bool:
    """Return whether ``folder`` has a manifest, right or wrong."""
    return (folder / MANIFEST_FILE).is_file()


def is_verifiable(folder: Path) -> bool:
    """Return whether ``folder`` can be verified; see [Note: Unverifiable tags]."""
    is_ours = any((folder / name).exists() for name in (MANIFEST_FILE, SAVING_FILE, STATE_FILE))
    return is_ours or _aside(folder).exists()  # `make_room` was killed


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder``.

    Raises CheckpointError if it is missing, damaged, or unsigned although `metadata.KEY_VARIABLE` is set.
    """
    try:
        text = inside(folder, MANIFEST_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"no {MANIFEST_FILE}: its saving was interrupted, or another program or an older ds_agsel wrote it (where "
            "it is known to be whole, ds_agsel.checkpoints.seal gives it one)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} is damaged: {error}") from None
    return read_manifest_text(text, MANIFEST_FILE)


def read_state(folder: Path) -> SelectionState:
    """Return the selection's state in ``folder``.

    Raises CheckpointError, naming the field, if it is wrong, and FileNotFoundError if it is missing.
    """
    try:
        content = parse_json(inside(folder, STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{STATE_FILE} can't be read ({error}). Load an earlier checkpoint with tag=.") from None
    return read_selection_state(content, STATE_FILE)


def problems(folder: Path, index: int = 0, count: int = 1) -> list[str]:
    """Return the problems of ``folder`` as sentences; empty if it is whole. Reads every file.

    ``count`` callers may share the work: each checks its part of the files, the ``index``-th.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    if not has_manifest(folder) and (folder / SAVING_FILE).exists():
        return ["its saving was interrupted"]
    try:
        files = read_manifest(folder).files
    except CheckpointError as error:
        return [str(error)]
    largest_first = sorted(files, key=lambda name: (-files[name][0], name))
    wrong = [found for name in largest_first[index::count] if (found := _problem(folder, name, files[name]))]
    if index == 0 and not wrong and (folder / STATE_FILE).exists():
        unlisted = [f"{STATE_FILE} is not in its {MANIFEST_FILE}"] if STATE_FILE not in files else []
        wrong += unlisted or _state_problems(folder)
    return wrong


def _state_problems(folder: Path) -> list[str]:
    try:
        content = parse_json(inside(folder, STATE_FILE).read_text(encoding="utf-8"))
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is int and version > STATE_VERSIONS[-1]:
            return []  # written by a newer ds_agsel: not damaged, and `read_state` reports it
        read_selection_state(content, STATE_FILE)
    except (OSError, ValueError, CheckpointError) as error:
        return [f"{error}" if isinstance(error, CheckpointError) else f"{STATE_FILE} can't be read ({error})"]
    return []


def tags(directory: Path) -> list[str]:
    """Return the tags in ``directory`` with a readable manifest, newest save first. Their files are not read."""
    return _newest_first(_manifests(directory))


def candidates(directory: Path, latest: str = LATEST_FILE) -> list[str]:
    """Return the tags to try if none is named: the one that ``latest`` names, then the others, newest save first.

    With `LATEST_UNIVERSAL_FILE` there are no others. Raises CheckpointError if ``latest`` leads out of
    ``directory``.
    """
    named: list[str] = []
    with suppress(FileNotFoundError):
        try:
            tag = inside(directory, latest).read_text(encoding="utf-8", errors="replace").strip()
            named += [folder_of(directory, tag).name] if tag else []
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{directory / latest}: {str(error).rstrip('.')}. Or pass tag=.") from None
    others = tags(directory) if latest == LATEST_FILE else []
    return named + [tag for tag in others if tag not in named]


def newest_whole(directory: Path) -> tuple[str | None, dict[str, list[str]]]:
    """Return the tag to load if none is named, and the problems of each newer tag that was skipped."""
    passed_over: dict[str, list[str]] = {}
    for tag in candidates(directory):
        passed_over[tag] = problems(directory / tag)
        if not passed_over[tag]:
            del passed_over[tag]
            return tag, passed_over
    return None, passed_over


def in_words(found: Sequence[str]) -> str:
    """Return ``problems`` as one phrase; a long list is cut short."""
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return "; ".join(found[:_LISTED]) + more


def _manifests(directory: Path) -> dict[str, Manifest]:
    found = {}
    for path in filter(Path.is_file, directory.glob(f"*/{MANIFEST_FILE}")):
        with suppress(CheckpointError):  # a bad one is skipped here and reported when that tag is loaded
            found[path.parent.name] = read_manifest(folder_of(directory, path.parent.name))
    return found


def _newest_first(found: Mapping[str, Manifest]) -> list[str]:
    return sorted(found, key=lambda tag: (found[tag].order, tag), reverse=True)


def _problem(folder: Path, name: str, entry: tuple[int, str]) -> str | None:
    size, digest = entry
    try:
        path = inside(folder, name)
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
            return f"{name} is not a file"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes, not {size}"
        return None if entry_of(path)[1] == digest else f"{name} has changed since it was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{name} can't be read ({error})"


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _remove(folder: Path) -> None:
    """Remove a tag's listed files, the manifest first, so that a killed removal never leaves a whole tag."""
    try:
        files = [*read_manifest(folder).files]
    except CheckpointError:
        files = []
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for name in (*files, SAVING_FILE):
        with suppress(ValueError, FileNotFoundError):  # a name that leads elsewhere, one that is gone already
            path = inside(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _marker(folder: Path) -> SavingMarker:
    """Return the marker that a save in progress, or one that was killed, left in ``folder``."""
    try:
        return SavingMarker.parse(inside(folder, SAVING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return SavingMarker()
