"""States in a file, by a stand-in for DeepSpeed's I/O op: what goes in comes out, in every form."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_agsel.errors import TrainingError
from ds_agsel.residency.rooms import master_room, moment_rooms
from ds_agsel.residency.states import MASTER
from ds_agsel.residency.swap import Rooms, SwappedStates, layout_of

PAGE = 4096
FORMS = [("fp32", "fp32"), ("split", "int8"), ("fp32", "bf16")]


class Handle:
    """The op, each transfer done when it is waited for."""

    def __init__(self) -> None:
        self._due: list[Callable[[], Any]] = []

    def new_cpu_locked_tensor(self, numel: int, like: Tensor) -> Tensor:
        return torch.full((numel,), 7, dtype=like.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor) -> None:
        """Do nothing."""

    def async_pread(self, tensor: Tensor, path: str, offset: int) -> int:
        return self._issue(os.preadv, tensor, path, offset)

    def async_pwrite(self, tensor: Tensor, path: str, offset: int) -> int:
        return self._issue(os.pwritev, tensor, path, offset)

    def _issue(self, operation: Any, tensor: Tensor, path: str, offset: int) -> int:
        assert tensor.nbytes % PAGE == offset % PAGE == 0  # direct I/O takes nothing else

        def transfer() -> None:
            file = os.open(path, os.O_RDWR)
            assert operation(file, [memoryview(tensor.numpy())], offset) == tensor.nbytes
            os.close(file)

        self._due.append(transfer)
        return 0

    def wait(self) -> int:
        due, self._due = self._due, []
        for transfer in due:
            transfer()
        return len(due)


def rooms_of(form: tuple[str, str], numel: int) -> Rooms:
    return {MASTER: master_room(form[0], numel), **moment_rooms(form[1], numel)}


def swapped(folder: Path, form: tuple[str, str], moved: list[tuple[str, int]] | None = None) -> SwappedStates:
    rooms = {group: rooms_of(form, numel) for group, numel in enumerate((5000, 1, 300))}
    layout = layout_of(rooms, PAGE)
    capacity = max(map(layout.size, rooms)) + PAGE
    log = [] if moved is None else moved
    states = SwappedStates(folder, rooms, PAGE, Handle, capacity, lambda *what: log.append(what))
    for group, of_group in rooms.items():
        states.store(group, {MASTER: numbers(of_group, group)[MASTER]})
    return states


def numbers(rooms: Rooms, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 127, (numel,), generator=generator).to(dtype) for name, (numel, dtype) in rooms.items()
    }


def is_new(tensors: dict[str, Tensor]) -> bool:
    return not any(tensor.any() for name, tensor in tensors.items() if name != MASTER)


@pytest.mark.parametrize("form", FORMS)
def test_what_an_update_leaves_is_what_the_next_one_finds(tmp_path, form):
    moved: list[tuple[str, int]] = []
    states = swapped(tmp_path, form, moved)
    layout = states.layout
    states.start([0, 2])
    for group in (0, 2):
        found = states.enter(group)
        assert torch.equal(found[MASTER], numbers(states.rooms[group], group)[MASTER])
        assert is_new(found)
        for name, tensor in numbers(states.rooms[group], 10 + group).items():
            assert found[name].dtype == tensor.dtype
            found[name].copy_(tensor)
        states.leave(group)
    assert sum(size for kind, size in moved if kind == "read") == sum(map(layout.master_size, (0, 2)))
    assert sum(size for kind, size in moved if kind == "written") == sum(map(layout.size, (0, 2)))
    assert [states.has_moments(group) for group in states.rooms] == [True, False, True]
    moved.clear()
    states.start([1, 2])
    assert is_new(states.enter(1))
    states.leave(1)
    again = states.enter(2)
    for name, tensor in numbers(states.rooms[2], 12).items():
        assert torch.equal(again[name], tensor) and torch.equal(
            states.mapped(0)[name], numbers(states.rooms[0], 10)[name]
        )
    assert sum(size for kind, size in moved if kind == "read") == layout.master_size(1) + layout.size(2)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_between_steps_replaces_a_part_and_each_tensor_is_its_own(tmp_path, form):
    states = swapped(tmp_path, form)
    rooms = states.rooms[0]
    assert states.mapped(0).keys() == {MASTER}
    new = numbers(rooms, 20)
    states.store(0, {name: tensor for name, tensor in new.items() if name != MASTER})
    mapped = states.mapped(0)
    assert mapped.keys() == rooms.keys()
    for name, tensor in mapped.items():
        assert torch.equal(tensor, numbers(rooms, 0)[name] if name == MASTER else new[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # a checkpoint writes no neighbour with it
    states.drop(0)
    states.start([0])
    assert states.mapped(0).keys() == {MASTER}
    assert is_new(states.enter(0))


def test_a_room_is_in_a_file_and_outlives_what_made_it(tmp_path):
    states = swapped(tmp_path, FORMS[0])
    room, other = states.room(3000), states.room(0)
    assert room.dtype == torch.float32 and room.shape == (3000,) and other.shape == (0,)
    room.copy_(torch.arange(3000.0))
    del states
    assert list(tmp_path.iterdir()) == []  # none has a name
    assert torch.equal(room, torch.arange(3000.0))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    states = swapped(tmp_path, FORMS[1])
    new = numbers(states.rooms[0], 30)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    size, total = states.layout.size(0), states.layout.total()
    with pytest.raises(
        TrainingError, match=f"no room in .*nvme_path .*No space left.* for {size} bytes.*{total} bytes"
    ):
        states.store(0, new)
    assert not states.has_moments(0) and torch.equal(states.mapped(0)[MASTER], numbers(states.rooms[0], 0)[MASTER])
    with pytest.raises(TrainingError, match=r"no room in .*nvme_path .* for 12 bytes of what is made of states"):
        states.room(3)
