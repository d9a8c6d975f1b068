"""Blocks that take no part in a step's forward: a vision tower and text-only batches, experts, dropped layers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from support import ALL, Case, assert_identical, batch, build, case_id, finish, partitions, weights
from test_zero3 import train_unevenly
from tiny_models import VOCABULARY, TinyLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

WIDTH = 6
STEPS = 6
TORCH = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}}
TWO = {"policy": "fixed", "fixed_blocks": ["vision.0", "head"]}


class Sighted(nn.Module):
    """A language model whose two vision layers run where there is an image: blocks 1 and 2 of seven."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.vision = nn.ModuleList(TinyLayer(WIDTH) for _ in range(2))
        self.layers = nn.ModuleList(TinyLayer(WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.kind = kind

    def forward(self, input_ids: Tensor, labels: Tensor, image: Tensor | None = None) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        if image is not None:
            for layer in self.vision:
                image = checkpoint(layer, image, use_reentrant=True) if self.kind == "reentrant" else layer(image)
            hidden = hidden + (image.detach() if self.kind == "detached" else image)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(self.norm(hidden))
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def engine_of(case: Case, kind: str = "plain") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Sighted(kind)
    return build(case, model, model_parameters=list(model.parameters()))


def micro_step(engine: Any, case: Case, step: int, micro: int, with_image: bool) -> None:
    data = batch(case, step, micro, torch.distributed.get_rank())
    if with_image:
        generator = torch.Generator().manual_seed(step)
        data["image"] = torch.randn(*data["input_ids"].shape, WIDTH, generator=generator)
    engine.backward(engine(**data).loss)
    engine.step()


def vision(tree: Any) -> Any:
    return {name: value for name, value in tree.items() if "vision" in name}


def see_on(case: Case, images: tuple[int, ...]) -> dict[str, Any]:
    """A run with an image in the steps ``images`` alone; states of the vision layers after each step."""
    engine = engine_of(case)
    seen, rates = [], []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            micro_step(engine, case, step, micro, step in images)
        held = [p for p in partitions(engine) if any("vision" in name for name in p["shapes"])]
        seen.append({"weights": vision(weights(engine)), "partitions": held})
        rates.append(float(engine.get_global_grad_norm()))
    return finish(engine, {"seen": seen, "norms": rates, "steps": engine.global_steps})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, offload", product((1, 2, 3), ("none", "cpu")))
def test_with_every_block_selected_it_has_gradient_zero_as_in_plain_deepspeed(workers, stage, offload, ranks):
    """An image in the first two steps alone; with CPU offload plain DeepSpeed applies the last gradient for ever."""
    images = (0, 1) if offload == "none" and stage != 3 else ()
    case = Case(stage=stage, offload=offload, accumulation=2, section=ALL, config=TORCH)
    every = workers(ranks).run(see_on, case, images)
    plain = workers(ranks).run(see_all_plain, case.but(section=None), images, list(every[0]["blocks"].values()))
    for expected, found in zip(plain, every, strict=True):
        assert_identical(expected["weights"], found["weights"])
        assert found["counts"] == (STEPS,) * 7


def see_all_plain(case: Case, images: tuple[int, ...], blocks: list[list[str]]) -> dict[str, Any]:
    """Plain DeepSpeed with one group a block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Sighted()
    named = dict(model.named_parameters())
    groups = [{"params": [named[name] for name in names]} for names in blocks]
    engine = build(case, model, model_parameters=groups)
    for step, micro in product(range(STEPS), range(case.accumulation)):
        micro_step(engine, case, step, micro, step in images)
    return finish(engine, {})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, offload", product((1, 2, 3), ("none", "cpu")))
def test_a_selected_block_that_did_not_run_is_not_updated_and_not_counted(workers, stage, offload, ranks):
    """Step by step one block of seven: 1 and 2 are the vision layers. Steps without any block to update are steps."""
    section = {"policy": "cyclic", "select_percent": 15}
    case = Case(stage=stage, offload=offload, accumulation=2, section=section)
    for run in workers(ranks).run(see_on, case, (1,)):
        planned = [blocks for _, _, blocks in run["history"]]
        assert run["steps"] == len(planned) == STEPS
        assert sorted(set(planned)) != [()] and () in planned
        counts = [sum(block in blocks for blocks in planned) for block in range(7)]
        assert list(run["counts"]) == counts and sum(counts) < STEPS
        for step in range(1, STEPS):
            if not {1, 2} & set(planned[step]):
                assert_identical(run["seen"][step - 1], run["seen"][step])
        assert [norm == 0 for norm in run["norms"]] == [blocks == () for blocks in planned]


def say(case: Case, kind: str) -> str:
    engine = engine_of(case, kind)
    try:
        for step in range(3):
            micro_step(engine, case, step, 0, True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
    return "trained"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["reentrant", "detached"])
@pytest.mark.parametrize(
    "section", [ALL, {"policy": "fixed", "fixed_blocks": ["vision.0", "head"]}], ids=["all", "two"]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_block_that_ran_and_got_no_gradient_is_an_error(workers, stage, kind, section, ranks):
    for said in workers(ranks).run(say, Case(stage=stage, section=section), kind):
        assert said.startswith("TrainingError: step 0: the selected block(s) vision.0"), said
        assert said.index("use_reentrant=False") < said.index("never_select")


def log_of(case: Case) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_agsel")
    logger.addHandler(handler)
    try:
        see_on(case, ())
    finally:
        logger.removeHandler(handler)
    return [line for line in lines if "took part" in line]


def test_it_is_said_once_a_block_on_rank_0(workers):
    section = {"policy": "fixed", "fixed_blocks": ["vision.0", "vision.1", "head"]}
    first, second = workers(2).run(log_of, Case(section=section))
    assert len(first) == 1 and "vision.0, vision.1" in first[0] and second == []


CASES = [Case(stage=s, offload=o, dtype=d) for s, o, d in product((1, 2), ("none", "cpu"), ("fp32", "bf16"))]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_experts_that_miss_micro_steps_get_their_own_sums(workers, case):
    """Micro-step 0 is the first expert's alone, 1 the second's, with ZeRO-1 and 2 as with ZeRO-3 without offload.

    In every step, so that what the step before has summed is at hand to be added to.
    """
    section = {"policy": "fixed", "fixed_blocks": ["layers.0", "layers.2"]}
    case = case.but(section=section, accumulation=2, steps=6)
    [expected] = workers(1).run(train_unevenly, case.but(stage=3, offload="none"), False)
    [found] = workers(1).run(train_unevenly, case, False)
    assert found["history"] == expected["history"]
    tolerance = {"fp32": 1e-5, "bf16": 3e-2}[case.dtype]
    for name, tensor in expected["weights"].items():
        moved = (tensor.float() - expected["start"][name].float()).norm()
        assert (found["weights"][name].float() - tensor.float()).norm() <= tolerance * moved, name
