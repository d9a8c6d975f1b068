"""Whole checkpoints: the manifest of a tag's files, written last. Needs neither torch nor deepspeed.

[Note: A whole tag] A tag is whole when its manifest, which checks itself, is there and every file it lists has the
size and sha256 it had when it was saved. While a tag is being saved it holds `SAVING_FILE`; the manifest is written
(temporary file, fsync, rename) once every file is on disk, and then `latest`. So at any moment of a save, and after
a kill or a power cut at any, the tags saved before are whole and this one is whole or known not to be. A whole tag
that is saved anew waits under another name until the new one is whole.

[Note: Unverifiable tags] A tag of plain DeepSpeed has neither file. Its weights load, with a warning, where it is named
by hand or by `latest`; nothing falls back to it and pruning leaves it. A tag of ours without a manifest, which an older
ds_agsel may have written, is refused; `seal` gives it one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_agsel.errors import CheckpointError
from ds_agsel.files import sync_folder, write_atomically

MANIFEST_FILE = "manifest.json"
STATE_FILE = "adagrad_select.json"
SAVING_FILE = ".saving"
LATEST_FILE = "latest"
LATEST_UNIVERSAL_FILE = "latest_universal"  # of DeepSpeed's converter
MANIFEST_VERSION = 1
_CHUNK_BYTES = 1 << 22
_LISTED = 5  # problems that a message names


@dataclass(frozen=True)
class Manifest:
    """What a whole tag holds.

    ``files``: path in the tag's folder -> (bytes, sha256). ``order``: later saves to one folder have higher ones.
    ``facts``: of the run: world_size, stage, steps, section_sha256, versions.
    """

    files: dict[str, tuple[int, str]]
    order: int
    facts: dict[str, Any]


def folder_of(directory: str | os.PathLike[str], tag: str) -> Path:
    """The folder of ``tag`` in ``directory``. Raises CheckpointError for a tag that leads out of it."""
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
    """(bytes, sha256) of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def entries(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """The manifest's lines for ``paths`` in ``folder``, each flushed to disk and read back."""
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


def make_room(folder: Path) -> None:
    """Make ``folder`` ready to be saved to. A whole tag there waits under another name for `settle` or `give_up`."""
    aside = _aside(folder)
    if aside.exists() and not has_manifest(folder):  # a save over it was killed
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    if folder.name in _manifests(folder.parent):
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SAVING_FILE, "over what another program wrote" if existed else "")
    (folder / MANIFEST_FILE).unlink(missing_ok=True)  # a damaged one
    sync_folder(folder.parent)


def write_manifest(folder: Path, files: Mapping[str, tuple[int, str]], facts: Mapping[str, Any]) -> None:
    """Declare ``folder`` whole. Raises CheckpointError where a file is missing: the folder is not shared by all ranks.

    Every file must be on disk (`entries`). What lies in ``folder`` beside ``files`` is somebody else's.
    """
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"a rank wrote {name} ({size} bytes), which this one does not see in {folder}. Save to a folder that "
                "all nodes share, or set checkpoint.use_node_local_storage=true."
            )
    order = 1 + max((manifest.order for manifest in _manifests(folder.parent).values()), default=0)
    content = {
        "version": MANIFEST_VERSION,
        "order": order,
        **facts,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
    }
    write_atomically(folder / MANIFEST_FILE, json.dumps({**content, "sha256": _digest(content)}, indent=1))
    (folder / SAVING_FILE).unlink(missing_ok=True)


def seal(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Declare ``folder`` whole as it is now: every file in it, whoever wrote it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST_FILE, SAVING_FILE)]
    write_manifest(folder, entries(folder, files), facts or {})


def settle(folder: Path) -> None:
    """``folder`` is whole: remove what it replaces, and take over what others have put there."""
    aside = _aside(folder)
    if aside.exists():
        ours = read_manifest(aside).files
        for path in [path for path in aside.rglob("*") if not path.is_dir()]:
            name = path.relative_to(aside)
            if name.as_posix() not in (*ours, MANIFEST_FILE) and not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.rename(folder / name)
        _remove(aside)


def give_up(folder: Path) -> None:
    """Undo `make_room` after a save that failed: remove what it wrote, put back what it was to replace."""
    marker = folder / SAVING_FILE
    if marker.exists() and not marker.read_text():  # else what was there has been written over: all of it stays
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
    if _aside(folder).exists() and not folder.exists():
        _aside(folder).rename(folder)


def write_latest(directory: Path, tag: str) -> None:
    """Let ``latest`` name ``tag``, which must be whole."""
    write_atomically(directory / LATEST_FILE, tag)


def prune(directory: Path, keep: int) -> list[str]:
    """Remove all but the ``keep`` newest whole tags, and what killed saves have left; returns the removed tags.

    Call it once the newest tag is verified. Only files that a manifest lists, or that a save of ours began, go.
    """
    removed = []
    for tag in tags(directory)[max(1, keep) :]:
        _remove(directory / tag)
        removed.append(tag)
    for marker in directory.glob(f"*/{SAVING_FILE}"):
        if not has_manifest(marker.parent) and not marker.read_text() and not _aside(marker.parent).exists():
            shutil.rmtree(marker.parent)
            removed.append(marker.parent.name)
    return removed


# ---------------------------------------------------------------------- reading


def has_manifest(folder: Path) -> bool:
    """Whether ``folder`` has a manifest, right or wrong."""
    return (folder / MANIFEST_FILE).is_file()


def is_verifiable(folder: Path) -> bool:
    """False for [Note: Unverifiable tags]."""
    is_ours = any((folder / name).exists() for name in (MANIFEST_FILE, SAVING_FILE, STATE_FILE))
    return is_ours or _aside(folder).exists()  # `make_room` was killed


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``. Raises CheckpointError where there is none, or a damaged one."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = content.pop("sha256")
        if _digest(content) != expected:
            raise ValueError("it does not have the sha256 it names")
        version, order, files = content.pop("version"), int(content.pop("order")), content.pop("files")
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"no {MANIFEST_FILE}: its saving was interrupted, or another program or an older ds_agsel wrote it (where "
            "it is known to be whole, ds_agsel.checkpoints.seal gives it one)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} is damaged: {error}") from None
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{MANIFEST_FILE} has version={version!r}; this ds_agsel reads {MANIFEST_VERSION}, another one wrote it"
        )
    return Manifest(listed, order, content)


def problems(folder: Path, index: int = 0, count: int = 1) -> list[str]:
    """What is wrong with ``folder``, in words; empty where it is whole. Reads every file.

    ``count`` callers may share the work: each finds what is wrong with its part of the files, the ``index``-th.
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
    return [found for name in largest_first[index::count] if (found := _problem(folder, name, files[name]))]


def tags(directory: Path) -> list[str]:
    """The tags in ``directory`` that have a readable manifest, the one saved last first. Their files are not read."""
    found = _manifests(directory)
    return sorted(found, key=lambda tag: (found[tag].order, tag), reverse=True)


def candidates(directory: Path, latest: str = LATEST_FILE) -> list[str]:
    """Tags to load where none is named: the one that ``latest`` names, then the others, the one saved last first.

    With `LATEST_UNIVERSAL_FILE` there are no others. Raises CheckpointError where ``latest`` leads out of
    ``directory``.
    """
    named: list[str] = []
    with suppress(FileNotFoundError):
        tag = (directory / latest).read_text(encoding="utf-8", errors="replace").strip()
        try:
            named += [folder_of(directory, tag).name] if tag else []
        except CheckpointError as error:
            raise CheckpointError(f"{directory / latest}: {error} Or pass tag=.") from None
    others = tags(directory) if latest == LATEST_FILE else []
    return named + [tag for tag in others if tag not in named]


def newest_whole(directory: Path) -> tuple[str | None, dict[str, list[str]]]:
    """The tag to load where none is named, and what is wrong with those that were passed over for it."""
    passed_over: dict[str, list[str]] = {}
    for tag in candidates(directory):
        passed_over[tag] = problems(directory / tag)
        if not passed_over[tag]:
            del passed_over[tag]
            return tag, passed_over
    return None, passed_over


def in_words(found: Sequence[str]) -> str:
    """Problems as one phrase, a long list cut short."""
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return "; ".join(found[:_LISTED]) + more


def _manifests(directory: Path) -> dict[str, Manifest]:
    found = {}
    for path in directory.glob(f"*/{MANIFEST_FILE}"):
        with suppress(CheckpointError):
            found[path.parent.name] = read_manifest(folder_of(directory, path.parent.name))
    return found


def _problem(folder: Path, name: str, entry: tuple[int, str]) -> str | None:
    size, digest = entry
    path = folder / name
    if not path.resolve().is_relative_to(folder.parent.resolve()):
        return f"{name} lies outside {folder.parent}"
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes, not {size}"
        return None if entry_of(path)[1] == digest else f"{name} has changed since it was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read ({error})"


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _remove(folder: Path) -> None:
    """Remove a tag's listed files, the manifest first: what is left of a removal that was killed is never whole."""
    try:
        files = [*read_manifest(folder).files]
    except CheckpointError:
        files = []
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
