"""Files that lie: names that lead elsewhere, links, crafted JSON, foreign runs and missing signatures do no harm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_agsel import checkpoints, metadata, tag_owner
from ds_agsel.errors import CheckpointError
from ds_agsel.files import inside, write_atomically
from ds_agsel.tag_owner import Run

RUN = Run()
STATE: dict[str, Any] = {
    "version": 2,
    "blocks": [["embedding", ["e.weight"]], ["layers.0", ["l.weight"]], ["head", ["h.weight"]]],
    "section": {"policy": "cyclic"},
    "update_counts": [2, 1, 0],
    "explore_steps": 1,
    "exploit_steps": 2,
    "history": [[1, "exploit", [0]], [2, "explore", [0, 1]]],
    "plan": {"step": 3, "phase": "exploit", "blocks": [2]},
    "policy": {},
}
OLD_STATE = {
    **{key: value for key, value in STATE.items() if not key.endswith("_steps")},
    "version": 1,
    "history": [[0, "exploit", [2]], *STATE["history"]],
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what reaches the disk is tested elsewhere; here it would only cost seconds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(directory: Path, tag: str, state: Any = STATE, run: Run = RUN, keep: int | None = None) -> Path:
    folder = directory / tag
    checkpoints.make_room(folder, run)
    (folder / "weights.pt").write_bytes(tag.encode())
    text = state if isinstance(state, str) else json.dumps(state)
    (folder / checkpoints.STATE_FILE).write_text(text)
    files = checkpoints.entries(folder, [folder / "weights.pt", folder / checkpoints.STATE_FILE])
    checkpoints.write_manifest(folder, files, run.facts())
    checkpoints.write_latest(directory, tag)
    checkpoints.settle(folder)
    if keep is not None:
        checkpoints.prune(directory, keep, run)
    return folder


def craft(folder: Path, **changes: Any) -> None:
    """Change the manifest, with a sha256 that fits."""
    path = folder / checkpoints.MANIFEST_FILE
    content = {**json.loads(path.read_text()), **changes}
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": metadata._sha256(content)}))


def whole_tags(directory: Path) -> list[str]:
    return [tag for tag in checkpoints.tags(directory) if not checkpoints.problems(directory / tag)]


# ------------------------------------------------------------------- paths, links


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/x", "../x", "a/../../x", "a//b", "a/./b", "a\\b", "a\0b"])
def test_a_name_that_may_lead_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="lies outside"):
        inside(tmp_path, name)


def test_a_name_is_not_followed_through_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert inside(tmp_path, "folder/x") == tmp_path / "folder" / "x"
    for name in ("link", "link/x"):
        with pytest.raises(ValueError, match="reached through the link"):
            inside(tmp_path, name)


def test_pruning_touches_nothing_outside_of_its_tags(tmp_path):
    """A manifest lists an absolute path, one with dots, one through a link, and a folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("absolute", "dots", "linked"):
        (outside / name).write_text("precious")
    directory = tmp_path / "run"
    folder = save(directory, "a")
    (folder / "link").symlink_to(outside)
    (folder / "sub").mkdir()
    listed = json.loads((folder / checkpoints.MANIFEST_FILE).read_text())["files"]
    names = [str(outside / "absolute"), "../../outside/dots", "link/linked", "sub"]
    craft(folder, files={**listed, **{name: {"bytes": 8, "sha256": "0" * 64} for name in names}})
    problems = checkpoints.problems(folder)
    assert len(problems) == 4 and all(any(name in problem for problem in problems) for name in names)
    for tag in "bcd":
        save(directory, tag, keep=2)
    assert not (directory / "a" / "weights.pt").exists() and whole_tags(directory) == ["d", "c"]
    assert [(outside / name).read_text() for name in ("absolute", "dots", "linked")] == ["precious"] * 3


def test_a_tag_that_is_a_link_is_neither_pruned_nor_saved_to(tmp_path):
    directory, other = tmp_path / "run", tmp_path / "other"
    save(other, "kept")
    save(directory, "a")
    (directory / "z_alias").symlink_to(directory / "a")
    (directory / "killed").symlink_to(other / "kept")
    (other / "kept" / checkpoints.SAVING_FILE).write_text(json.dumps({"run": RUN.id, "is_new": True}))
    save(directory, "b", keep=1)
    assert (directory / "z_alias").is_symlink() and whole_tags(other) == ["kept"]
    for tag in ("z_alias", "killed"):
        with pytest.raises(CheckpointError, match="is a link, and links are not followed"):
            checkpoints.make_room(directory / tag, RUN)
        checkpoints.give_up(directory / tag)
        assert (directory / tag).is_symlink()
    assert whole_tags(other) == ["kept"]


def test_a_save_does_not_write_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run" / "a").mkdir(parents=True)
    (tmp_path / "run" / "a" / "weights.pt").symlink_to(precious)
    with pytest.raises(CheckpointError, match=r"weights\.pt is a link"):
        checkpoints.make_room(tmp_path / "run" / "a", RUN)
    for name in ("latest", f".latest.{os.getpid()}"):
        (tmp_path / "run" / name).symlink_to(precious)
    write_atomically(tmp_path / "run" / "latest", "a")
    assert precious.read_text() == "mine" and not (tmp_path / "run" / "latest").is_symlink()


def test_a_latest_that_is_a_link_is_not_read(tmp_path):
    save(tmp_path, "a")
    (tmp_path / "latest").rename(tmp_path / "elsewhere")
    (tmp_path / "latest").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"latest is reached through the link .*Or pass tag="):
        checkpoints.candidates(tmp_path)


# ------------------------------------------------------------- two runs, one folder


def test_runs_that_share_a_folder_never_remove_each_others_tags(tmp_path):
    mine, yours = Run(), Run()
    for step in range(4):
        save(tmp_path, f"mine{step}", run=mine, keep=2)
        save(tmp_path, f"yours{step}", run=yours, keep=1)
    checkpoints.make_room(tmp_path / "mine_saving", mine)
    assert checkpoints.prune(tmp_path, 1, yours) == []
    assert sorted(whole_tags(tmp_path)) == ["mine2", "mine3", "yours3"]
    assert checkpoints.prune(tmp_path, 1, mine) == ["mine2", "mine_saving"]


def test_a_run_clears_up_after_the_one_it_goes_on_from_once_that_has_ended(tmp_path):
    first, second = Run(), Run()
    for step in range(3):
        save(tmp_path, f"first{step}", run=first, keep=3)
    second.go_on_from(checkpoints.read_manifest(tmp_path / "first2").facts)
    save(tmp_path, "second0", run=second, keep=1)
    assert sorted(whole_tags(tmp_path)) == ["first0", "first1", "first2", "second0"]  # the first run still lives
    first.release()
    save(tmp_path, "second1", run=second, keep=1)
    assert whole_tags(tmp_path) == ["second1"]
    third = Run()
    third.go_on_from(checkpoints.read_manifest(tmp_path / "second1").facts)
    assert third.ancestors == (first.id, second.id)


def test_without_locks_a_run_removes_its_own_tags_alone(tmp_path, monkeypatch, caplog):
    def no_locks(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(tag_owner.fcntl, "flock", no_locks)
    first, second = Run(), Run()
    save(tmp_path, "first", run=first)
    second.go_on_from(first.facts())
    for tag in "ab":
        save(tmp_path, tag, run=second, keep=1)
    assert sorted(whole_tags(tmp_path)) == ["b", "first"]
    assert "can't be locked" in caplog.text


def test_tags_of_an_older_ds_agsel_belong_to_who_goes_on_from_them(tmp_path):
    old = save(tmp_path, "old")
    facts = json.loads((old / checkpoints.MANIFEST_FILE).read_text())
    craft(old, **{key: None for key in ("run", "ancestors") if key in facts})
    stranger, heir = Run(), Run()
    save(tmp_path, "stranger", run=stranger, keep=1)
    assert "old" in whole_tags(tmp_path)
    stranger.release()
    heir.go_on_from(checkpoints.read_manifest(old).facts)
    save(tmp_path, "heir", run=heir, keep=1)
    assert sorted(whole_tags(tmp_path)) == ["heir", "stranger"]


# ---------------------------------------------------------------------- signatures


def test_with_a_key_saves_sign_and_only_what_it_signed_loads(tmp_path, monkeypatch):
    save(tmp_path, "unsigned")
    monkeypatch.setenv(metadata.KEY_VARIABLE, "secret")
    signed = save(tmp_path, "signed")
    assert whole_tags(tmp_path) == ["signed"]
    assert "is not signed" in checkpoints.problems(tmp_path / "unsigned")[0]
    (signed / "weights.pt").write_bytes(b"tampered")
    size, digest = checkpoints.entry_of(signed / "weights.pt")
    listed = json.loads((signed / checkpoints.MANIFEST_FILE).read_text())["files"]
    craft(signed, files={**listed, "weights.pt": {"bytes": size, "sha256": digest}})
    assert "does not fit the key" in checkpoints.problems(signed)[0]
    save(tmp_path, "another")
    monkeypatch.setenv(metadata.KEY_VARIABLE, "another secret")
    assert "does not fit the key" in checkpoints.problems(tmp_path / "another")[0]
    monkeypatch.delenv(metadata.KEY_VARIABLE)
    assert sorted(whole_tags(tmp_path)) == ["another", "signed", "unsigned"]  # sha256 stops nobody
    monkeypatch.setenv(metadata.KEY_VARIABLE, "")
    assert "is set and empty" in checkpoints.problems(tmp_path / "another")[0]


# ------------------------------------------------------------------ crafted metadata


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[" * 100_000, "deeply"),
        ('{"order": Infinity}', "Infinity is not a JSON number"),
        ("[]", "not a JSON object"),
        ({"order": 1e999}, "Infinity is not a JSON number"),
        ({"order": -1}, "order"),
        ({"order": "1"}, "order"),
        ({"order": True}, "order"),
        ({"files": []}, "files"),
        ({"files": {"weights.pt": {"bytes": -1, "sha256": "0" * 64}}}, r"files\.weights\.pt\.bytes"),
        ({"files": {"weights.pt": {"bytes": 1, "sha256": "../x"}}}, r"files\.weights\.pt\.sha256"),
        ({"files": {"weights.pt": [1]}}, r"files\.weights\.pt"),
        ({"stage": "3"}, "stage"),
        ({"world_size": 1.5}, "world_size"),
        ({"run": 7}, "run"),
        ({"ancestors": "abc"}, "ancestors"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_manifest_names_its_field_and_stops_nothing(tmp_path, text, field):
    save(tmp_path, "good")
    bad = save(tmp_path, "bad")
    if isinstance(text, str):
        (bad / checkpoints.MANIFEST_FILE).write_text(text)
    else:
        craft(bad, **text)
    with pytest.raises(CheckpointError, match=field):
        checkpoints.read_manifest(bad)
    found, passed_over = checkpoints.newest_whole(tmp_path)
    assert found == "good" and list(passed_over) == ["bad"]
    assert whole_tags(save(tmp_path, "next", keep=1).parent)[0] == "next"


@pytest.mark.parametrize(
    ("state", "field"),
    [
        ("[" * 100_000, "deeply"),
        ([], "not a JSON object"),
        ("{", "can't be read"),
        ({key: value for key, value in STATE.items() if key != "blocks"}, "blocks"),
        ({**STATE, "blocks": [["a"]]}, r"blocks\.0"),
        ({**STATE, "update_counts": [2, 1]}, "update_counts has 2 counts for 3 blocks"),
        ({**STATE, "update_counts": [2, 1, -1]}, r"update_counts\.2"),
        ({**STATE, "update_counts": ["2", 1, 0]}, r"update_counts\.0"),
        ({**STATE, "update_counts": [2.0, 1, 0]}, r"update_counts\.0"),
        ({**STATE, "update_counts": [4, 1, 0]}, r"update_counts\.0 is 4, more than the 3 steps"),
        ({**STATE, "explore_steps": True}, "explore_steps"),
        ({**STATE, "plan": {"step": 0, "phase": "exploit", "blocks": [2]}}, r"plan\.step is 0, and 3 steps"),
        ({**STATE, "plan": {"step": 3, "phase": "exploit", "blocks": [3]}}, r"plan\.blocks"),
        ({**STATE, "plan": {"step": 3, "phase": "exploit", "blocks": None}}, r"plan\.blocks"),
        ({**STATE, "plan": {"step": 3, "phase": "rest", "blocks": [2]}}, r"plan\.phase"),
        ({**STATE, "plan": []}, "plan"),
        ({**STATE, "history": [[1, "exploit"]]}, r"history\.0"),
        ({**STATE, "history": [[1, "exploit", [0], 4]]}, r"history\.0"),
        ({**STATE, "history": [[2, "explore", [1, 1]]]}, r"history\.0 has \[1, 1\]"),
        ({**STATE, "history": [[2, "explore", [9]]]}, r"history\.0 has \[9\]"),
        ({**STATE, "history": [[7, "explore", [0]]]}, r"history\.0 is step 7"),
        ({**OLD_STATE, "history": OLD_STATE["history"][1:]}, r"history\.0 is step 1"),
        ({**STATE, "policy": []}, "policy"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_a_bad_state_names_its_field_and_the_next_whole_tag_is_taken(tmp_path, state, field):
    save(tmp_path, "good")
    bad = save(tmp_path, "bad", state)  # with a manifest that fits
    with pytest.raises(CheckpointError, match=field):
        checkpoints.read_state(bad)
    found, passed_over = checkpoints.newest_whole(tmp_path)
    assert found == "good" and passed_over["bad"][0].startswith(checkpoints.STATE_FILE)


def test_states_of_both_versions_are_read(tmp_path):
    for version in (STATE, OLD_STATE):
        found = checkpoints.read_state(save(tmp_path, "a", version))
        assert (found.num_steps, found.explore_steps, found.update_counts) == (3, 1, [2, 1, 0])
    newer = save(tmp_path, "b", {"version": 3})
    assert checkpoints.problems(newer) == []  # not damaged
    with pytest.raises(CheckpointError, match=r"version=3; this ds_agsel reads versions 1 to 2"):
        checkpoints.read_state(newer)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from([*STATE, "order", "files", "sha256", "step", "phase", "bytes", "../x", "/etc/passwd"])
    return st.lists(leaves, max_size=3) | st.dictionaries(keys | st.text(max_size=5), leaves, max_size=4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("explore"),
    nested,
    max_leaves=12,
)


def suppress_newer(state: Any) -> contextlib.AbstractContextManager[Any]:
    """A state that says it is of a newer ds_agsel is not damaged; reading it is an error that says so."""
    newer = isinstance(state, dict) and isinstance(state.get("version"), int) and state["version"] > 2
    return pytest.raises(CheckpointError, match="version=") if newer else contextlib.nullcontext()


FIELD = st.sampled_from(["version", "order", "files", "stage", "world_size", "run", "ancestors", "dtype", "versions"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    manifest=st.dictionaries(FIELD, JSON, max_size=2),
    state=st.dictionaries(st.sampled_from(list(STATE)), JSON, max_size=2) | st.text(max_size=30),
    latest=st.none() | st.text(max_size=12) | st.sampled_from(["..", "../outside", "/", "bad", "good"]),
    marker=st.none() | JSON.map(json.dumps) | st.text(max_size=10),
)
def test_whatever_the_metadata_say_the_good_tag_loads_or_one_clear_error_comes(
    tmp_path, manifest, state, latest, marker
):
    directory = tmp_path / "run"
    shutil.rmtree(directory, ignore_errors=True)
    (tmp_path / "outside").write_text("precious")
    save(directory, "good")
    bad = save(directory, "bad", state if isinstance(state, str) else {**STATE, **state})
    craft(bad, **manifest)
    if latest is not None:
        (directory / "latest").write_text(latest, encoding="utf-8", errors="surrogatepass")
    if marker is not None:
        (bad / checkpoints.SAVING_FILE).write_text(marker, encoding="utf-8", errors="surrogatepass")
    try:
        found = checkpoints.newest_whole(directory)[0]
    except CheckpointError as error:
        assert "latest" in str(error)
        (directory / "latest").unlink()
        found = checkpoints.newest_whole(directory)[0]
    assert found in ("good", "bad")
    if found == "bad":
        with suppress_newer(state):
            assert checkpoints.read_state(bad).num_steps >= 0
    save(directory, "next", keep=1)
    assert "next" in whole_tags(directory) and (tmp_path / "outside").read_text() == "precious"
