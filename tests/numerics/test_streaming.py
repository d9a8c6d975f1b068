"""Explore steps hold the gradients of k + 1 blocks at most, and choose what they would with all of them at hand."""

from __future__ import annotations

from typing import Any

import pytest
from support import FIRST, TOPK, VISIT, Case, build, case_id, differences, forward_backward, train, weights
from torch import nn

CASES = [
    Case(section=TOPK, steps=3),
    Case(section={**TOPK, **VISIT}, dtype="bf16", steps=3, zero={"overlap_comm": True}),
    Case(section=TOPK, offload="cpu", steps=3),
    Case(section=TOPK, offload="cpu", dtype="bf16", steps=3, config={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case(section={**FIRST, "policy": "gradient_topk"}, accumulation=3, steps=3),
    Case(section={**FIRST, "policy": "gradient_topk"}, offload="cpu", accumulation=2, steps=3),
    Case(stage=3, section=TOPK, steps=3),
    Case(stage=3, section={**TOPK, **VISIT}, dtype="bf16", steps=3, zero={"overlap_comm": True, "sub_group_size": 300}),
    Case(stage=3, section=TOPK, offload="cpu", dtype="bf16", steps=3, zero={"reduce_scatter": False}),
    Case(stage=3, section={**FIRST, "policy": "gradient_topk"}, accumulation=3, steps=3),
    Case(stage=3, section={**FIRST, "policy": "gradient_topk"}, offload="cpu", accumulation=2, steps=3),
]


class GradientWatch:
    """The most blocks that had a gradient anywhere at once, seen whenever backward hands one over."""

    def __init__(self) -> None:
        self.most_blocks = 0
        self.trains: set[int] = set()  # blocks with a parameter that required gradients in the last forward

    def observe(self, event: str, engine: Any, step: int) -> dict[str, Any] | None:
        zero = engine.optimizer
        block_of = {name: block.index for block in engine.selection.blocks for name in block.parameter_names}
        if (event, step) == ("start", 0):
            for parameter in engine.module.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: self._look(zero, block_of))

            def note(*args: Any) -> None:
                named = engine.module.named_parameters()
                self.trains = {block_of[name] for name, parameter in named if parameter.requires_grad}

            next(engine.module.children()).register_forward_pre_hook(note)
            return None
        if event == "backward":
            self._look(zero, block_of)
            return {"most_blocks": self.most_blocks, "trains": self.trains}
        return None

    def _look(self, zero: Any, block_of: dict[str, int]) -> None:
        holding = self._holding_stage3 if hasattr(zero, "fp16_groups") else self._holding
        self.most_blocks = max(self.most_blocks, len(holding(zero, block_of)))

    def _holding_stage3(self, zero: Any, block_of: dict[str, int]) -> set[int]:
        holding = {block_of[zero.param_names[p]] for group in zero.fp16_groups for p in group if p.grad is not None}
        for group, members in enumerate(zero.fp16_groups):
            on_host = zero.offload_optimizer and zero.fp32_partitioned_groups_flat[group].grad is not None
            if on_host or zero._gradients.holds(group) or zero.averaged_gradients.get(group):
                holding.add(block_of[zero.param_names[members[0]]])
        return holding

    def _holding(self, zero: Any, block_of: dict[str, int]) -> set[int]:
        holding = {block_of[zero.param_names[p]] for group in zero.bit16_groups for p in group if p.grad is not None}
        for group, members in enumerate(zero.bit16_groups):
            held = [zero.averaged_gradients.get(group), zero.all_grad_tensors.get(group)]
            on_host = zero.cpu_offload and zero.single_partition_of_fp32_groups[group].grad is not None
            if on_host or any(held):
                holding.add(block_of[zero.param_names[members[0]]])
        return holding


def train_and_watch(case: Case) -> dict[str, Any]:
    return train(case, GradientWatch().observe)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_explore_steps_hold_the_gradients_of_one_block_more_than_they_choose(workers, case, ranks):
    for run in workers(ranks).run(train_and_watch, case):
        chosen = len(run["history"][0][2])
        assert [phase for _, phase, _ in run["history"]] == ["explore"] * case.steps
        assert chosen < len(run["blocks"]) - 1
        assert 1 <= max(seen["most_blocks"] for seen in run["observed"]) <= chosen + 1


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_choice_is_that_of_all_gradients(trained, offload, stage):
    """ZeRO-1 does not stream: it keeps every gradient to the end."""
    case = Case(stage=stage, section=TOPK, offload=offload, model="net")
    streamed, whole = trained(case, 2)[0], trained(case.but(stage=1), 2)[0]
    assert streamed["history"] == whole["history"]
    assert len({blocks for _, _, blocks in whole["history"]}) > 1


@pytest.mark.parametrize("stage, ranks", [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_the_first_micro_batch_decides_for_the_window(workers, stage, ranks):
    case = Case(stage=stage, section=FIRST, accumulation=3, steps=6)
    for run in workers(ranks).run(train_and_watch, case):
        seen = [step["trains"] for step in run["observed"]]
        assert {phase for _, phase, _ in run["history"]} == {"explore", "exploit"}
        every = set(range(len(run["blocks"])))
        for step, (_, phase, blocks) in enumerate(run["history"]):
            first = every if phase == "explore" else set(blocks)
            wanted = [first, set(blocks), set(blocks)]
            if stage == 3 and step == 0:  # the first window goes through all blocks: [Note: First backward] in stage3
                wanted = [every] * 3
            assert seen[3 * step : 3 * step + 3] == wanted


def step_on_two_backwards(case: Case) -> str:
    engine = build(case)
    forward_backward(engine, case, 0, 0)
    try:
        forward_backward(engine, case, 0, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
    return "nothing was said"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_second_backward_in_an_explore_step_is_refused(workers, stage):
    [said] = workers(1).run(step_on_two_backwards, Case(stage=stage, section=TOPK))
    assert said.startswith("TrainingError: step 0 explores, and block")
    assert "Call backward once a step" in said


def skip_a_bad_window(case: Case) -> dict[str, Any]:
    """A window whose first micro-batch has non-finite gradients, then a good one."""
    engine = build(case)
    before = weights(engine)
    embedding: nn.Parameter = next(iter(engine.module.parameters()))
    hook = embedding.register_hook(lambda gradient: gradient * float("nan"))
    for micro_step in range(case.accumulation):
        forward_backward(engine, case, 0, micro_step)
        hook.remove()
        engine.step()
    unchanged = not differences(before, weights(engine))
    skipped = (len(engine.selection.history), engine.skipped_steps)
    for micro_step in range(case.accumulation):
        forward_backward(engine, case, 1, micro_step)
        engine.step()
    result = {"unchanged": unchanged, "skipped": skipped, "applied": len(engine.selection.history)}
    engine.destroy()
    return result


@pytest.mark.parametrize("stage, offload", [(2, "none"), (2, "cpu"), (3, "none")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_first_micro_batch_without_finite_scores_skips_its_step(workers, stage, offload, ranks):
    case = Case(stage=stage, section=FIRST, accumulation=2, offload=offload)
    for seen in workers(ranks).run(skip_a_bad_window, case):
        assert seen == {"unchanged": True, "skipped": (0, 1), "applied": 1}


def gradient_bytes_copied(case: Case) -> list[tuple[int, int]]:
    """Of each step: bytes of gradients copied to the host, and fp32 bytes of this rank's part of what was selected."""

    def observe(event: str, engine: Any, step: int) -> tuple[int, int] | None:
        if event != "step":
            return None
        zero = engine.optimizer
        groups = zero._groups_of(engine.selection.history[-1].blocks)
        slices = [
            zero.grad_position[zero.get_param_id(p)][3] for group in groups for p in zero.params_in_partition[group]
        ]
        return engine.selection.traffic[-1].d2h_bytes, 4 * sum(slices)

    return [seen for seen in train(case, observe)["observed"] if seen is not None]


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_offload_only_gradients_of_chosen_blocks_travel(workers, ranks):
    """Although others are the best so far, for a while, in the middle of backward."""
    case = CASES[2]
    assert case.offload == "cpu"
    for run in workers(ranks).run(gradient_bytes_copied, case):
        assert len(run) == case.steps
        assert all(copied == selected > 0 for copied, selected in run)
