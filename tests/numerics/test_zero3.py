"""What only ZeRO-3 has: models that never exist whole, experts without a token, leaf modules."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    ALL,
    SELECT,
    Case,
    assert_identical,
    build,
    ds_config,
    finish,
    relative_error,
    run_steps,
    tiny_model,
    weights,
)
from tiny_models import LENGTH, VOCABULARY
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_outputs import CausalLMOutput


def train_partitioned_from_birth(case: Case, folder: Path | None) -> dict[str, Any]:
    """A model made inside `zero.Init`, or with a folder by `from_pretrained` under `HfDeepSpeedConfig`."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    if folder is None:
        with deepspeed.zero.Init(config_dict_or_path=ds_config(case)):
            model = tiny_model(case)
    else:
        hold = HfDeepSpeedConfig(ds_config(case))
        model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        del hold
    held = sum(parameter.numel() for parameter in model.parameters())
    engine = build(case, model)
    numels = [block.numel for block in engine.selection.blocks]
    return finish(engine, run_steps(engine, case)) | {"held": held, "numels": numels}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model, offload", [("net", "none"), ("llama", "cpu")])
def test_a_model_that_never_exists_whole_trains_as_one_that_did(workers, tmp_path, trained, model, offload, ranks):
    case = Case(stage=3, model=model, offload=offload, zero={"stage3_param_persistence_threshold": 20})
    whole = tiny_model(case)
    folder = None
    if model == "llama":
        whole.save_pretrained(folder := tmp_path / "model")
    runs = workers(ranks).run(train_partitioned_from_birth, case, folder)
    for expected, found in zip(trained(case, ranks), runs, strict=True):
        assert found["held"] == 0
        assert sum(found["numels"]) == sum(parameter.numel() for parameter in whole.parameters())
        kept = ("blocks", "losses", "norms", "weights", "history")  # not partitions: zero.Init leaves padding as it was
        assert_identical({key: expected[key] for key in kept}, {key: found[key] for key in kept})


class Experts(nn.Module):
    """Two experts as ordinary modules: tokens below half the vocabulary go to the first, the others to the second."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert, mask in zip(self.experts, (input_ids < VOCABULARY // 2, input_ids >= VOCABULARY // 2), strict=True):
            if mask.any():
                output[mask] = expert(hidden[mask])
        return output


class MoeLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.moe = Experts(width)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return hidden + self.moe(self.norm(hidden), input_ids)


class TinyMoe(nn.Module):
    def __init__(self, width: int = 6):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(MoeLayer(width) for _ in range(3))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, input_ids)
        logits = self.head(hidden)
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def moe_engine(case: Case, leaf: bool = False) -> Any:
    from deepspeed.utils import set_z3_leaf_modules

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyMoe()
    if leaf:
        set_z3_leaf_modules(model, [Experts])
    return build(case, model, model_parameters=list(model.parameters()))


def tokens(step: int, expert: int | None) -> dict[str, Tensor]:
    """A batch whose tokens all go to ``expert``; to both where it is None."""
    low, high = {None: (0, VOCABULARY), 0: (0, VOCABULARY // 2), 1: (VOCABULARY // 2, VOCABULARY)}[expert]
    ids = torch.randint(low, high, (2, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids.flip(1)}


def expert_without_token(case: Case) -> dict[str, Any]:
    """Two steps of all experts, then one in which the second gets no token: its states before and after, the norm,
    and the norm of the gradients that there were."""
    from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state

    engine = moe_engine(case)
    names = {name: parameter for name, parameter in engine.module.named_parameters() if "layers.1." in name}
    for step in range(2):
        engine.backward(engine(**tokens(step, None)).loss)
        engine.step()

    def states() -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: safe_get_full_optimizer_state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")}
            for name, parameter in names.items()
        }

    before = states()
    engine.backward(engine(**tokens(2, 0)).loss)
    gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in names.items()}
    engine.step()
    norm = float(engine.get_global_grad_norm())
    return finish(engine, {"before": before, "after": states(), "norm": norm, "gradients": gradients})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, offload", product((2, 3), ("none", "cpu")))
def test_an_expert_without_a_token_has_gradient_zero(workers, stage, offload, ranks):
    """Not left out, and not its gradient of an earlier step, which plain ZeRO-3 applies and counts in the norm."""
    section = {"policy": "fixed", "fixed_blocks": ["layers.1"]}
    for run in workers(ranks).run(expert_without_token, Case(stage=stage, offload=offload, section=section)):
        gradients = {name: gradient for name, gradient in run["gradients"].items() if "experts.1" not in name}
        squared = sum(gradient.double().pow(2).sum().item() for gradient in gradients.values())
        assert run["norm"] == pytest.approx(squared**0.5, rel=1e-5)
        for name, before in run["before"].items():
            idle = name not in gradients
            if idle:
                assert not run["gradients"][name].any()
            for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.98)):
                decayed = torch.allclose(run["after"][name][key], beta * before[key], rtol=1e-6, atol=0)
                assert decayed == idle, (name, key)


def train_unevenly(case: Case, leaf: bool) -> dict[str, Any]:
    """Rank r's tokens all go to expert r; on one rank, micro-step r's."""
    engine = moe_engine(case, leaf)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    start = weights(engine)
    for step in range(case.steps):
        for micro_step in range(case.accumulation):
            engine.backward(engine(**tokens(step, rank if ranks > 1 else micro_step)).loss)
            engine.step()
    traffic = [counters.reduced_bytes for counters in engine.selection.traffic]
    padded = {
        block.index: sum(
            2 * 4 * getattr(parameter, "partition_numel", parameter.numel)()
            for name, parameter in engine.module.named_parameters()
            if name in block.parameter_names
        )
        for block in engine.selection.blocks
    }
    return finish(engine, {"start": start, "traffic": traffic, "padded": padded})


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_experts_that_differ_between_ranks_or_micro_steps(workers, offload):
    """As a leaf module (DeepSpeed's set_z3_leaf_modules) on two ranks, as ordinary modules on one: the same run.

    A leaf module's hook hands on gradients of all its parameters, also of frozen ones: those are dropped.
    """
    case = Case(stage=3, offload=offload, section=SELECT | {"explore_rate": 0.5}, clip=0.3)
    (one,) = workers(1).run(train_unevenly, case.but(accumulation=2), False)
    two = workers(2).run(train_unevenly, case, True)
    for run in two:
        assert run["history"] == one["history"]
        for name, expected in one["weights"].items():
            assert relative_error(expected, run["weights"][name], one["start"][name]) <= 3e-3, name
        for (_, phase, blocks), reduced in zip(run["history"], run["traffic"], strict=True):
            if phase == "exploit":
                assert reduced == sum(run["padded"][index] for index in blocks)


def train_mixtral(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MixtralForCausalLM(
                MixtralConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=16,
                    intermediate_size=20,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    num_local_experts=3,
                    max_position_embeddings=LENGTH,
                    tie_word_embeddings=False,
                    attn_implementation="eager",
                    use_cache=False,
                )
            )
        engine = build(case, model)
        results.append(finish(engine, run_steps(engine, case)))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_layer_of_mixtral_is_a_block(workers, offload, ranks):
    case = Case(stage=3, offload=offload, steps=4)
    for selective, every, plain in workers(ranks).run(
        train_mixtral, [case, case.but(section=ALL), case.but(section=None)]
    ):
        names = ("embedding", *(f"model.layers.{index}" for index in range(3)), "final_norm", "head")
        assert tuple(selective["blocks"]) == names
        assert any("experts" in name for name in selective["blocks"]["model.layers.1"])
        assert {phase for _, phase, _ in selective["history"]} == {"explore", "exploit"}
        kept = ("losses", "norms", "weights", "partitions")
        assert_identical({key: plain[key] for key in kept}, {key: every[key] for key in kept})
