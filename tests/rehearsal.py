"""Steps on toy states that visit a device, and on states that never move: what `residency` is tested by."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any
from unittest import mock

import torch

from ds_agsel.residency import arena, eviction_order, plan_moves, update_order
from ds_agsel.residency.states import MASTER, MOMENTS
from ds_agsel.residency.transfer import HostState, StateTransfer, block_bytes


class Twin:
    """The same steps on states that never move, and on states that visit an accelerator within a budget."""

    def __init__(
        self, device: Any, numels: list[int], keys: tuple[str, ...], budget_numel: int, is_cache: bool = False
    ) -> None:
        self.is_cache = is_cache
        self.counts: Counter[int] = Counter()
        self.keys = keys
        self.still = [self._new_state(group, numel) for group, numel in enumerate(numels)]
        self.states = [
            HostState(self._pinned(device, self._new_state(group, numel).master), {})
            for group, numel in enumerate(numels)
        ]
        self.groups = {block: [group for group in range(len(numels)) if group // 2 == block]
                       for block in range((len(numels) + 1) // 2)}  # fmt: skip
        self.moved = {"h2d": 0, "d2h": 0}
        self.sizes = block_bytes(self.states, self.groups, keys)
        self.budget = max(4 * len(keys) * budget_numel, *self.sizes.values())

        def new_moment(group: int, key: str) -> torch.Tensor:
            return self._pinned(device, torch.full((numels[group],), torch.nan))

        self.transfer = StateTransfer(device, self.states, self.groups, keys, self._count, self.budget, new_moment)

    @staticmethod
    def _new_state(group: int, numel: int) -> HostState:
        return HostState(torch.linspace(group, group + 1, numel), {})

    @staticmethod
    def _pinned(device: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if device.is_synchronized_device() else device.pin_memory(tensor)

    def _count(self, direction: str, num_bytes: int) -> None:
        self.moved[direction] += num_bytes

    def step(self, selected: set[int], number: int) -> None:
        may_stay = eviction_order(self.transfer.resident, self.counts) if self.is_cache else ()
        moves = plan_moves(self.transfer.resident, selected, self.sizes, self.budget, may_stay)
        self.counts.update(selected)
        order = update_order(self.transfer.resident, selected)
        self.transfer.carry_out(move for move in moves if move.after is None)
        for block in order:
            self.transfer.wait_for(block)
            for group in self.groups[block]:
                self._update(self.transfer.on_device(group), number)
                still = self.still[group]
                for key in MOMENTS:
                    still.state.setdefault(key, torch.zeros_like(still.master))
                self._update({key: tensor for key in self.keys if (tensor := still.get(key)) is not None}, number)
            self.transfer.updated(block)
            self.transfer.carry_out(move for move in moves if move.after == block)

    @staticmethod
    def _update(tensors: dict[str, torch.Tensor], number: int) -> None:
        """Something that depends on every number, on the order of steps, and on each tensor."""
        moment, square = tensors[MOMENTS[0]], tensors[MOMENTS[1]]
        moment.mul_(0.5).add_(number + 1)
        square.add_(moment * moment)
        if MASTER in tensors:
            tensors[MASTER].sub_(moment).add_(square.sqrt())

    def check(self) -> None:
        for state, still in zip(self.states, self.still, strict=True):
            for key in self.keys:
                expected, actual = still.get(key), state.get(key)
                if expected is None or actual is None:
                    assert expected is actual
                else:
                    assert torch.equal(expected, actual)


@mock.patch.object(arena, "ALIGNMENT", 1)  # so that the arena has no room beyond the budget, and gaps must be closed
def rehearse(device: Any, seed: int, steps: int = 8) -> Twin:
    """Random blocks, budget, selections and points at which the host reads, as ``seed`` has them."""
    draw = random.Random(seed)
    numels = [draw.randint(1, 40) for _ in range(draw.randint(3, 12))]
    keys = draw.choice([(MASTER, *MOMENTS), MOMENTS])
    twin = Twin(device, numels, keys, draw.randint(1, sum(numels)), is_cache=draw.random() < 0.5)
    for number in range(steps):
        twin.step(set(draw.sample(list(twin.groups), draw.randint(1, len(twin.groups)))), number)
        assert twin.transfer.peak_bytes <= twin.budget
        if draw.random() < 0.2:
            twin.transfer.bring_home(twin.groups)
            twin.check()
        if draw.random() < 0.1:
            twin.transfer.send_home(twin.groups)
            assert twin.transfer.resident_bytes() == 0
    twin.transfer.bring_home(twin.groups)
    twin.check()
    return twin
