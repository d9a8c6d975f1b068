"""At an exploit step nothing of an unselected block is computed, communicated or copied.

Counted twice: by the engine's own counters, and from outside, by watching every operator that torch dispatches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import DTYPES, Case, case_id, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CASES = [
    *(Case(stage=stage, offload=offload, accumulation=accumulation, dtype=dtype)
      for stage, offload, accumulation, dtype in product((1, 2), ("none", "cpu"), (1, 3), ("fp32", "bf16"))
      if (stage == 2) ^ (offload == "cpu") ^ (accumulation == 3) ^ (dtype == "bf16")),
    Case(offload="cpu", decay_groups=True, clip=0.3),
    Case(decay_groups=True, zero={"overlap_comm": True}),
    Case(stage=3, dtype="bf16", zero={"sub_group_size": 300}),
    Case(stage=3, offload="cpu", accumulation=3, decay_groups=True),
    Case(stage=3, offload="cpu", clip=0.3, zero={"stage3_param_persistence_threshold": 0}),
]  # fmt: skip


class Watch(TorchDispatchMode):
    """Between "start" and "step": bytes handed to collectives by (phase, operator), and what was written to.

    ``written[phase]`` has a (block, kind of storage) for each operator, and each call of DeepSpeed's C++ Adam, that
    writes to a block's model weights, masters, moments or host gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: dict[tuple[str, str], int] = {}
        self.written: set[tuple[int, str]] = set()
        self.stepped_numel = 0
        self.phase = "start"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("c10d"):
            key = (self.phase, name.split(".")[1])
            # A gather's output comes first, a reduce-scatter's input second: the larger of the two is what travels.
            sizes = [sum(tensor.numel() * tensor.element_size() for tensor in _tensors(side)) for side in args[:2]]
            self.collectives[key] = self.collectives.get(key, 0) + max(sizes)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.wrote(value)
        return result

    def wrote(self, value: Any) -> None:
        for tensor in _tensors(value):
            if tensor.numel():
                start, end = _extent(tensor)
                self.written |= {
                    owner
                    for (held_start, held_end), owner in (*self.lasting, *self.host_gradients())
                    if held_start < end and start < held_end
                }

    def host_gradients(self) -> Iterator[tuple[tuple[int, int], tuple[int, str]]]:
        """Those that there are now: a buffer may go from block to block."""
        for block, master in self.masters:
            if master.grad is not None:
                yield _extent(master.grad), (block, "gradient")

    def learn_storages(self, engine: Any) -> None:
        zero = engine.optimizer
        self.lasting: list[tuple[tuple[int, int], tuple[int, str]]] = []
        self.masters: list[tuple[int, Tensor]] = []
        for block, master, weights in groups_of(engine):
            state = zero.optimizer.state.get(master, {})
            held = {
                "weights": weights,
                "masters": master,
                "exp_avg": state.get("exp_avg"),
                "exp_avg_sq": state.get("exp_avg_sq"),
            }
            self.masters.append((block, master))
            self.lasting += [
                (_extent(tensor), (block, kind))
                for kind, tensor in held.items()
                if tensor is not None and tensor.numel()
            ]


def groups_of(engine: Any) -> list[tuple[int, Tensor, Tensor]]:
    """(block, fp32 partition, flat model weights: with stage 3 this rank's alone) of all that DeepSpeed steps."""
    zero = engine.optimizer
    block_of = {name: block.index for block in engine.selection.blocks for name in block.parameter_names}
    if hasattr(zero, "fp16_groups"):
        found = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
    else:
        found = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups_flat, strict=True)
    return [(block_of[zero.param_names[members[0]]], master, weights) for members, master, weights in found]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes from its first element to its last: ZeRO-3's flat weights are pieces of one storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def watch_steps(case: Case) -> dict[str, Any]:
    """A run of ``case`` with a `Watch` over every step."""
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    adam, fused = CPUAdamBuilder().load(), FusedAdamBuilder().load()
    original, original_fused = adam.adam_update, fused.multi_tensor_adam
    watch: Watch | None = None

    def adam_update(*args: Any) -> Any:
        parameter = args[8]
        if watch is not None:
            watch.stepped_numel += parameter.numel()
            watch.wrote(list(args[8:]))
        return original(*args)

    def multi_tensor_adam(size: int, flag: Tensor, tensors: list[list[Tensor]], *args: Any) -> Any:
        if watch is not None:
            watch.stepped_numel += sum(tensor.numel() for tensor in tensors[1])
            watch.wrote(tensors)
        return original_fused(size, flag, tensors, *args)

    frozen: set[str] = set()  # while forward ran; after backward parameters are as the user has them

    def note_frozen(module: Any, *_: Any) -> None:
        nonlocal frozen
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}

    def observe(event: str, engine: Any, step: int) -> dict[str, Any] | None:
        nonlocal watch
        if event == "start":
            if step == 0:
                engine.module.register_forward_hook(note_frozen)
            watch = Watch()
            watch.__enter__()
            watch.learn_storages(engine)
            return None
        if event == "backward":
            watch.phase = "backward"
            watch.learn_storages(engine)
            return {"frozen": frozen, "held_gradient_bytes": engine.optimizer.held_gradient_bytes()}
        watch.__exit__(None, None, None)
        seen = {
            "collectives": watch.collectives,
            "written": watch.written,
            "stepped_numel": watch.stepped_numel,
        }
        watch = None
        zero = engine.optimizer
        return seen | {
            "traffic": vars(engine.selection.traffic[-1]).copy(),
            "partition_numel": _sum_by_block(engine, [master for _, master, _ in groups_of(engine)]),
            "flat_numel": _sum_by_block(engine, [weights for _, _, weights in groups_of(engine)]),
            "block_numel": [block.numel for block in engine.selection.blocks],
            "state_bytes": zero.state_bytes(),
            "staging_bytes": zero.staging_bytes() if case.stage < 3 else None,
            "counts": engine.selection.update_counts,
        }

    adam.adam_update, fused.multi_tensor_adam = adam_update, multi_tensor_adam
    try:
        return train(case, observe)
    finally:
        adam.adam_update, fused.multi_tensor_adam = original, original_fused


def _sum_by_block(engine: Any, tensors: list[Tensor]) -> dict[int, int]:
    sums = dict.fromkeys(range(len(engine.selection.blocks)), 0)
    for (block, _, _), tensor in zip(groups_of(engine), tensors, strict=True):
        sums[block] += tensor.numel()
    return sums


@pytest.fixture(scope="module")
def watched(workers):
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def run(case: Case, ranks: int) -> list[dict[str, Any]]:
        key = (repr(case), ranks)
        if key not in runs:
            runs[key] = workers(ranks).run(watch_steps, case)
        return runs[key]

    return run


def steps_of(
    run: dict[str, Any], case: Case
) -> list[tuple[str, tuple[int, ...], list[dict[str, Any]], dict[str, Any]]]:
    """(phase, selected blocks, what was seen after each backward, what was seen after the step) of each step."""
    stride = case.accumulation + 1
    seen = [run["observed"][start : start + stride] for start in range(0, len(run["observed"]), stride)]
    return [
        (phase, blocks, moments[:-1], moments[-1])
        for (_, phase, blocks), moments in zip(run["history"], seen, strict=True)
    ]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_nothing_of_an_unselected_block_is_touched(watched, case, ranks):
    for run in watched(case, ranks):
        for phase, selected, backwards, after in steps_of(run, case):
            lasting = {(block, kind) for block, kind in after["written"] if kind != "gradient"}
            assert {block for block, _ in lasting} == set(selected)
            assert {kind for _, kind in lasting} >= {"weights", "masters"}
            if phase == "exploit":
                assert {block for block, _ in after["written"]} <= set(selected)
                unselected = {
                    name
                    for index, names in enumerate(run["blocks"].values())
                    if index not in selected
                    for name in names
                }
                assert all(moment["frozen"] == unselected for moment in backwards)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_counters_say_what_was_moved(watched, case, ranks):
    itemsize = DTYPES[case.dtype].itemsize
    for run in watched(case, ranks):
        for step, (phase, selected, _, after) in enumerate(steps_of(run, case)):
            traffic = after["traffic"]
            assert traffic["step"] == step
            active = range(len(after["block_numel"])) if phase == "explore" else selected
            gradients = sum(after["block_numel"][index] for index in active)
            reductions = 0 if ranks == 1 else case.accumulation if case.stage >= 2 else 1
            assert traffic["reduced_bytes"] == gradients * itemsize * reductions
            stepped = sum(after["partition_numel"][index] for index in selected)
            assert traffic["stepped_numel"] == after["stepped_numel"] == stepped
            flat = sum(after["flat_numel"][index] for index in selected)
            if case.stage == 3:
                assert_stage3_counters(case, ranks, traffic, stepped, gradients)
                continue
            assert traffic["gathered_bytes"] == (flat * itemsize if ranks > 1 else 0)
            assert traffic["h2d_bytes"] >= (stepped * itemsize if case.offload == "cpu" else 0)
            if case.offload == "none":
                assert traffic["d2h_bytes"] == traffic["h2d_bytes"] == 0
            elif case.accumulation == 1:
                assert traffic["h2d_bytes"] == stepped * itemsize
                # Every rank copies its own slices, without ZeRO's padding; ZeRO-2 those of blocks not yet beaten.
                least = gradients if case.stage == 1 else sum(after["block_numel"][index] for index in selected)
                assert least * 4 // ranks * 0.8 <= traffic["d2h_bytes"] <= gradients * 4 // ranks * 1.2


def assert_stage3_counters(case: Case, ranks: int, traffic: dict[str, int], stepped: int, gradients: int) -> None:
    """After the step only weights that stay gathered are gathered; the sum of gradients goes to the host and back at
    each micro-step, and in fp32 to the host at the last."""
    itemsize = DTYPES[case.dtype].itemsize
    persist = case.zero.get("stage3_param_persistence_threshold") != 0
    assert traffic["gathered_bytes"] == (stepped * ranks * itemsize if ranks > 1 and persist else 0)
    partitions = gradients // ranks
    if case.offload == "none":
        assert traffic["d2h_bytes"] == traffic["h2d_bytes"] == 0
    else:
        assert traffic["h2d_bytes"] == partitions * itemsize * case.accumulation + stepped * itemsize
        assert traffic["d2h_bytes"] == partitions * (itemsize * case.accumulation + 4)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_collectives_seen_from_outside_are_those_counted(watched, case):
    """Beside the gradients and weights only scalars travel, and on explore steps one number a parameter."""
    for run in watched(case, 2):
        for step, (phase, _, _, after) in enumerate(steps_of(run, case)):
            seen, traffic = after["collectives"], after["traffic"]
            if case.stage == 3:
                if step < 2:
                    continue  # DeepSpeed records the order of modules, and compares it between ranks
                seen = without_gathers_of_forward_and_backward(case, seen)
            gathered = sum(size for (_, name), size in seen.items() if "allgather" in name)
            everything = sum(seen.values())
            assert gathered == traffic["gathered_bytes"]
            small = everything - gathered - traffic["reduced_bytes"]
            assert 0 <= small <= (1000 if phase == "explore" else 300)


def without_gathers_of_forward_and_backward(case: Case, seen: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """What stage 3 does not keep gathered is gathered there, whatever is selected; what it keeps never is."""
    gathers = {key for key in seen if key[0] == "start" and "allgather" in key[1]}
    assert bool(gathers) == (case.zero.get("stage3_param_persistence_threshold") == 0)
    return {key: size for key, size in seen.items() if key not in gathers}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_memory_follows_what_was_selected(watched, case, ranks):
    itemsize = DTYPES[case.dtype].itemsize
    for run in watched(case, ranks):
        for phase, selected, backwards, after in steps_of(run, case):
            updated = [index for index, count in enumerate(after["counts"]) if count]
            assert after["state_bytes"] == sum(2 * 4 * after["partition_numel"][index] for index in updated)
            if phase == "exploit":
                flat = sum(after["flat_numel"][index] for index in selected)
                on_accelerator, on_host = backwards[-1]["held_gradient_bytes"]
                assert on_host <= flat * (4 + itemsize)
                assert on_accelerator <= (0 if case.offload == "cpu" else flat * max(itemsize, 4))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case.offload == "cpu" and case.stage < 3], ids=case_id)
def test_staging_is_as_large_as_the_largest_step(watched, case, ranks):
    for run in watched(case, ranks):
        largest = 0
        for _, selected, _, after in steps_of(run, case):
            largest = max(largest, sum(after["partition_numel"][index] for index in selected))
            assert after["staging_bytes"] == largest * DTYPES[case.dtype].itemsize
        assert largest < sum(after["partition_numel"].values())


def test_the_watch_sees_what_plain_deepspeed_does(workers):
    """The control of the tests above: with every block selected, every storage of every block is written."""
    run = workers(1).run(watch_steps, Case(steps=2, offload="cpu", section={"policy": "all"}))[0]
    kinds = ("weights", "masters", "exp_avg", "exp_avg_sq", "gradient")
    for _, _, _, after in steps_of(run, Case(steps=2))[1:]:
        assert after["written"] == set(product(range(6), kinds))
        assert torch.tensor(after["block_numel"]).sum() <= after["stepped_numel"]
