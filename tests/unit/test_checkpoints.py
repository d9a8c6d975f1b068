"""Whole tags, as files alone: what is damaged is found, what leaves the folder is refused, nothing whole is removed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from test_checkpoint_trust import STATE

from ds_agsel import checkpoints
from ds_agsel.errors import CheckpointError
from ds_agsel.tag_owner import Run

RUN = Run()
FILES = {"mp_rank_00_model_states.pt": b"weights" * 100, "zero/optim.pt": b"\0\1\2" * 50, "empty.pt": b""}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what reaches the disk is tested elsewhere; here it would only cost seconds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(directory: Path, tag: str, content: bytes = b"", latest: bool = True) -> Path:
    folder = checkpoints.folder_of(directory, tag)
    checkpoints.make_room(folder, RUN)
    write_files(folder, content)
    checkpoints.write_manifest(
        folder, checkpoints.entries(folder, [folder / name for name in FILES]), {"stage": 2, **RUN.facts()}
    )
    if latest:
        checkpoints.write_latest(directory, tag)
    checkpoints.settle(folder)
    return folder


def write_files(folder: Path, content: bytes) -> None:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data + content)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_saved_tag_is_whole_and_says_what_it_is(tmp_path):
    folder = save(tmp_path, "a")
    assert checkpoints.problems(folder) == []
    manifest = checkpoints.read_manifest(folder)
    assert manifest.facts == {"stage": 2, **RUN.facts()} and manifest.files["empty.pt"][0] == 0
    assert sorted(manifest.files) == sorted(FILES)
    assert checkpoints.newest_whole(tmp_path) == ("a", {})
    assert {path.name for path in folder.iterdir()} == {name.split("/")[0] for name in (*FILES, "manifest.json")}


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero/optim.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_any_damage_is_found_and_the_tag_before_is_taken(tmp_path, name, damage):
    save(tmp_path, "a")
    path = save(tmp_path, "b") / name
    data = path.read_bytes()
    match damage:
        case "flip":
            flip(path, data.index(b"sha256") + 12 if name == "manifest.json" else len(data) // 2)
        case "truncate":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
    tag, passed_over = checkpoints.newest_whole(tmp_path)
    assert tag == "a" and list(passed_over) == ["b"]
    [problem] = passed_over["b"]
    assert Path(name).name in problem


def test_every_byte_of_a_manifest_counts(tmp_path):
    folder = save(tmp_path, "a")
    text = (folder / "manifest.json").read_bytes()
    whole = checkpoints.read_manifest(folder)
    for at in range(len(text)):
        flip(folder / "manifest.json", at)
        with contextlib.suppress(CheckpointError):
            assert checkpoints.read_manifest(folder) == whole  # the flip changed white space
        (folder / "manifest.json").write_bytes(text)


def test_shares_of_the_work_find_what_one_finds(tmp_path):
    folder = save(tmp_path, "a")
    for name in FILES:
        (folder / name).write_bytes(b"other")
    shared = [problem for index in range(2) for problem in checkpoints.problems(folder, index, 2)]
    assert sorted(shared) == sorted(checkpoints.problems(folder)) and len(shared) == 3


@pytest.mark.parametrize("tag", ["", ".", "..", "../a", "a/b", "/tmp/a", "a/..", "..\\a"])
def test_a_tag_that_leaves_the_folder_is_refused(tmp_path, tag):
    with pytest.raises(CheckpointError, match="is not the name of a folder in"):
        checkpoints.folder_of(tmp_path, tag)


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(tmp_path):
    inside, outside = tmp_path / "run", tmp_path / "outside"
    save(inside, "a")
    save(outside, "b")
    (inside / "alias").symlink_to(inside / "a")
    (inside / "link").symlink_to(outside / "b")
    assert checkpoints.problems(checkpoints.folder_of(inside, "alias")) == []
    with pytest.raises(CheckpointError, match=r"is a link to .*outside"):
        checkpoints.folder_of(inside, "link")
    (inside / "latest").write_text("../outside/b")
    with pytest.raises(CheckpointError, match=r"latest: checkpoint tag '\.\./outside/b' is not the name"):
        checkpoints.newest_whole(inside)
    (inside / "latest").unlink()
    assert checkpoints.newest_whole(inside)[0] in ("a", "alias")  # not the link
    path = inside / "a" / "empty.pt"
    path.unlink()
    path.symlink_to(outside / "b" / "empty.pt")
    assert checkpoints.problems(inside / "a") == [
        f"empty.pt is reached through the link {path}, and links are not followed"
    ]


def test_latest_goes_first_and_a_damaged_one_is_passed_over(tmp_path):
    for tag in "abc":
        save(tmp_path, tag)
    (tmp_path / "latest").write_text("a")
    assert checkpoints.candidates(tmp_path) == ["a", "c", "b"]
    for damaged in ("", "c\0\xff"):
        (tmp_path / "latest").write_text(damaged)
        assert checkpoints.newest_whole(tmp_path)[0] == "c"
    (tmp_path / "latest").unlink()
    assert checkpoints.newest_whole(tmp_path) == ("c", {})


def test_a_save_that_was_killed_is_not_whole_at_any_moment(tmp_path):
    save(tmp_path, "a")
    folder = checkpoints.folder_of(tmp_path, "b")
    checkpoints.make_room(folder, RUN)
    assert checkpoints.problems(folder) == ["its saving was interrupted"] and checkpoints.is_verifiable(folder)
    write_files(folder, b"")
    assert checkpoints.problems(folder) == ["its saving was interrupted"]
    (folder / ".manifest.json.1").write_text("half of it")
    assert checkpoints.newest_whole(tmp_path) == ("a", {})
    save(tmp_path, "b")
    assert checkpoints.newest_whole(tmp_path) == ("b", {})


def test_saving_a_tag_anew_keeps_the_whole_one_until_the_new_one_is(tmp_path):
    folder = save(tmp_path, "last", b"one")
    (folder / "tokenizer.json").write_text("somebody's")
    for _ in range(2):  # killed twice in a row
        checkpoints.make_room(folder, RUN)
        write_files(folder, b"two")
        tag, passed_over = checkpoints.newest_whole(tmp_path)
        assert tag == ".last.replaced" and passed_over == {"last": ["its saving was interrupted"]}
        assert (tmp_path / tag / "empty.pt").read_bytes() == b"one"
    checkpoints.give_up(folder)
    assert checkpoints.newest_whole(tmp_path) == ("last", {}) and (folder / "empty.pt").read_bytes() == b"one"
    save(tmp_path, "last", b"three")
    assert (folder / "empty.pt").read_bytes() == b"three" and (folder / "tokenizer.json").read_text() == "somebody's"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["last"]


@pytest.mark.parametrize("damaged", ["empty.pt", checkpoints.MANIFEST_FILE])
def test_a_kill_while_room_is_made_leaves_nothing_that_passes_for_plain_deepspeeds(tmp_path, monkeypatch, damaged):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    save(tmp_path, "a")
    folder = save(tmp_path, "b")
    (folder / damaged).write_text("damage")
    monkeypatch.setattr(checkpoints, "write_atomically", kill)
    with pytest.raises(Killed):
        checkpoints.make_room(folder, RUN)
    assert checkpoints.is_verifiable(folder)
    assert checkpoints.newest_whole(tmp_path)[0] == "a"


def test_what_another_program_has_put_there_outlives_a_save_that_fails(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    checkpoints.make_room(folder, RUN)
    write_files(folder, b"")
    checkpoints.give_up(folder)
    assert (folder / "mine.txt").read_text() == "mine"


def test_pruning_removes_old_whole_tags_and_what_kills_left_and_nothing_else(tmp_path):
    for tag in "abcd":
        save(tmp_path, tag)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mp_rank_00_model_states.pt").write_bytes(b"of plain DeepSpeed")
    checkpoints.make_room(tmp_path / "killed", RUN)
    assert sorted(checkpoints.prune(tmp_path, 2, RUN)) == ["a", "b", "killed"]
    assert (tmp_path / "a" / "notes.txt").exists() and (tmp_path / "plain" / "mp_rank_00_model_states.pt").exists()
    assert not list((tmp_path / "a").rglob("*.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ds_agsel.lock", "a", "c", "d", "latest", "plain"]
    assert checkpoints.prune(tmp_path, 0, RUN) == ["c"] and checkpoints.problems(tmp_path / "d") == []


def test_a_file_that_this_rank_does_not_see_is_a_folder_that_is_not_shared(tmp_path):
    folder = tmp_path / "a"
    checkpoints.make_room(folder, RUN)
    write_files(folder, b"")
    files = checkpoints.entries(folder, [folder / name for name in FILES])
    (folder / "zero/optim.pt").unlink()
    with pytest.raises(CheckpointError, match=r"zero/optim\.pt.*use_node_local_storage=true"):
        checkpoints.write_manifest(folder, files, {})
    assert checkpoints.problems(folder) == ["its saving was interrupted"]


def test_ours_without_a_manifest_is_refused_until_it_is_sealed(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adagrad_select.json").write_text(json.dumps(STATE))
    (tmp_path / "latest").write_text("a")
    tag, passed_over = checkpoints.newest_whole(tmp_path)
    assert tag is None and "seal" in passed_over["a"][0]
    checkpoints.seal(folder)
    assert checkpoints.newest_whole(tmp_path) == ("a", {})
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {"adagrad_select.json"}
