"""Checkpoints truncated, flipped, deleted, and ranks killed at random moments of saving: nothing is lost.

Each trial resumes from what the one before has left, compares every state with the run that never stopped, bit for
bit, and ends by SIGKILL at a random moment of a save; then some are damaged by hand.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import savers
from support import Case

from ds_agsel import checkpoints

CASE = Case(model="net", stage=2, offload="cpu", decay_groups=True, steps=12)


def uninterrupted(world_size: int, directory: Path) -> tuple[list[dict[int, str]], float]:
    """Each rank's digest after each step, and how long a save takes, in seconds."""
    states: list[dict[int, str]] = [{} for _ in range(world_size)]
    seconds = []
    with savers.ranks(CASE, world_size, directory) as ranks:
        for rank in range(world_size):
            began = 0.0
            while (message := ranks.next(rank)) != ("end", None):
                assert message is not None, f"rank {rank} died"
                kind, value = message
                if kind == "state":
                    states[rank][value[0]] = value[1]
                elif kind == "saving":
                    began = time.monotonic()
                elif rank == 0:
                    seconds.append(time.monotonic() - began)
    return states, sorted(seconds)[len(seconds) // 2]


def damage(folder: Path, dice: random.Random) -> str:
    """Truncate, flip a bit of, or delete one of the files of a whole tag; says what was done."""
    listed = [*checkpoints.read_manifest(folder).files, checkpoints.MANIFEST_FILE]  # a killed save may have left more
    path = dice.choice(sorted(folder / name for name in listed if (folder / name).stat().st_size))
    data = path.read_bytes()
    kind = dice.choice(["truncated", "flipped", "deleted"])
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: dice.randrange(len(data))])
    else:
        at = dice.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
    return f"{folder.name}/{path.relative_to(folder)} was {kind}"


def run_trials(world_size: int, trials: int, directory: Path, seed: int) -> None:
    states, save_seconds = uninterrupted(world_size, directory / "reference")
    directory = directory / "killed"
    dice = random.Random(seed)
    interrupted, damaged = 0, 0
    saved = 0  # the newest step that was saved and not damaged
    for trial in range(3 * trials):
        if trial >= trials and interrupted >= trials / 4:
            break
        # The first leaves two whole tags: one is damaged, and the next trial has to go on from the other.
        kills_after_saves = dice.randrange(3) if damaged else 2
        with savers.ranks(CASE, world_size, directory) as ranks:
            victim = dice.randrange(world_size)
            kind, (step, digest) = ranks.next(victim)
            where = f"trial {trial} of seed {seed}: rank {victim}, resumed at step {step}"
            assert kind == "state" and digest == states[victim][step], where
            assert step >= saved, f"{where}, though step {saved} was saved"
            while (message := ranks.next(victim)) is not None and message != ("end", None):
                kind, value = message
                if kind == "state":
                    assert value[1] == states[victim][value[0]], f"{where}: differs after step {value[0]}"
                elif kind == "saved":
                    saved = value
                    kills_after_saves -= 1
                elif kills_after_saves <= 0:
                    time.sleep(dice.random() * save_seconds)
                    break
            assert message is not None, f"{where}: the rank died"
            ranks.kill(victim)
            finished = message == ("end", None)
            while (message := ranks.next(victim)) is not None:  # what it had said before
                saved = message[1] if message[0] == "saved" else saved
        found = checkpoints.newest_whole(directory)[0]
        interrupted += any("interrupted" in why for tag in directory.iterdir() for why in checkpoints.problems(tag))
        whole = [tag for tag in checkpoints.tags(directory) if not checkpoints.problems(directory / tag)]
        assert found in whole or saved == 0
        if finished:
            shutil.rmtree(directory)
            saved = 0
        elif len(whole) > 1 and (not damaged or dice.random() < 0.4):
            done = damage(directory / whole[0], dice)
            damaged += 1
            if checkpoints.problems(directory / whole[0]):
                saved = checkpoints.read_manifest(directory / whole[1]).facts["steps"]
            else:
                assert "manifest.json was flipped" in done  # in white space
    assert interrupted >= trials / 4, f"only {interrupted} of {trial + 1} kills hit a save"
    assert damaged


@pytest.mark.parametrize(("world_size", "trials"), [pytest.param(1, 7, marks=pytest.mark.slow), (2, 3)])
def test_kills_and_damage_lose_nothing(world_size: int, trials: int, tmp_path: Path) -> None:
    run_trials(world_size, trials, tmp_path, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "trials"), [(1, 38), (2, 12)])
def test_fifty_kills_lose_nothing(world_size: int, trials: int, tmp_path: Path) -> None:
    run_trials(world_size, trials, tmp_path, seed=1)
