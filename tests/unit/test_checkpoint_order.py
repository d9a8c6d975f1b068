"""What reaches the disk in which order, read off the system calls: a power cut at any moment finds only whole tags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_agsel import checkpoints
from ds_agsel.tag_owner import Run

RUN = Run()
FILES = ("weights.pt", "zero/optim.pt")


class Calls(list[tuple[str, str]]):
    """("fsync" | "replace" | "rename" | "unlink", path), in order; a replace names the new path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
        super().__init__()
        self._base = base
        for name in ("fsync", "replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, call: Any) -> Any:
        def record(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else args[0] if args else target
            result = call(target, *args, **kwargs)
            self.append((name, os.path.relpath(path, self._base)))
            return result

        return record

    def places(self, name: str, path: str) -> list[int]:
        """Where the calls are. A fsync of a temporary file stands for the file that it becomes."""
        temporary = os.path.normpath(os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}"))
        found = [place for place, call in enumerate(self) if call in ((name, path), (name, temporary))]
        assert found, f"no {name} of {path} in {list(self)}"
        return found


def save(directory: Path, tag: str) -> None:
    """What the leading rank does, in its order."""
    folder = directory / tag
    checkpoints.make_room(folder, RUN)
    (folder / "zero").mkdir()
    for name in FILES:
        (folder / name).write_bytes(b"data")
    checkpoints.write_manifest(folder, checkpoints.entries(folder, [folder / name for name in FILES]), RUN.facts())
    checkpoints.write_latest(directory, tag)
    checkpoints.settle(folder)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name what is synced")
def test_files_then_folders_then_the_manifest_then_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "a")
    calls = Calls(monkeypatch, tmp_path)
    save(tmp_path, "a")  # over a whole one
    manifest, latest = calls.places("replace", "a/manifest.json")[-1], calls.places("replace", "latest")[-1]
    for name in FILES:
        [synced] = calls.places("fsync", f"a/{name}")
        folder = [place for place in calls.places("fsync", str(Path("a", name).parent)) if place > synced]
        assert synced < folder[0] < manifest, f"{name} and its folder are on disk before the manifest says so"
    assert calls.places("fsync", "a/manifest.json")[-1] < manifest
    assert any(manifest < place < latest for place in calls.places("fsync", "a")), "the manifest's name is on disk"
    assert manifest < latest and calls.places("fsync", "latest")[-1] < latest
    assert any(latest < place for place in calls.places("fsync", "."))
    moved_away = calls.places("rename", ".a.replaced")[-1]
    assert any(moved_away < place < manifest for place in calls.places("fsync", ".")), "the old tag is aside for good"
    assert calls.places("unlink", ".a.replaced/manifest.json")[0] > latest, "the old tag goes last"
    assert calls.places("unlink", ".a.replaced/manifest.json") < calls.places("unlink", ".a.replaced/weights.pt")
    assert checkpoints.newest_whole(tmp_path) == ("a", {})
