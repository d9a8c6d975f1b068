"""Predicted seconds, by hand; and activations as autograd really keeps them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_agsel.blocks import Block
from ds_agsel.estimate.activations import activations_of
from ds_agsel.estimate.cards import Card
from ds_agsel.estimate.models import known_models
from ds_agsel.estimate.prediction import Rates, Seconds, Work, full_seconds, selective_seconds
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import ModelShape
from ds_agsel.estimate.steps import exact_step

CARD = Card("c", "", flops=2.0, memory_bytes=28.0, link_bytes=1.0, nvlink_bytes=4.0)
RATES = Rates(CARD, host_bytes=28.0, nvme_bytes=12.0)
WORK = Work(tokens=1, sequence_length=1, checkpointing=False)
# A tied model: layers of 10 and 6 weights over an embedding of 4.
TIED = ModelShape(
    "tied", (Block(0, "embedding", (), 4), Block(1, "l.0", (), 10), Block(2, "l.1", (), 6)),
    ((4,), (10,), (6,)), (0, 1, 2), ((4, 10, 6),),
)  # fmt: skip


def exploit(*selected: int, resident: tuple[int, ...] = ()):
    return exact_step("exploit", 3, selected, range(3), range(3), resident)


def seconds(setup: Setup, stepping, *selected: int, work: Work = WORK, rates: Rates = RATES) -> Seconds:
    return selective_seconds(TIED, setup, stepping, exploit(*selected), work, rates)


def test_computing_is_counted_in_products():
    resident = Setup()
    assert seconds(resident, "resident", 2).compute == 20 + 4 + 6  # forward; back through the head; the top layer's own
    assert seconds(resident, "resident", 1).compute == 20 + (4 + 6) + 10
    assert seconds(resident, "resident", 0).compute == 20 + (4 + 10 + 6) + 4
    again = replace(WORK, checkpointing=True)
    assert seconds(resident, "resident", 1, work=again).compute == 20 + 2 * (4 + 6) + 10
    assert full_seconds(TIED, resident, WORK, RATES).compute == 20 + 20 + 20


def test_an_untied_embedding_is_a_lookup():
    model = replace(TIED, blocks=(*TIED.blocks, Block(3, "head", (), 4)), groups=((4,), (10,), (6,), (4,)),
                    block_of_group=(0, 1, 2, 3))  # fmt: skip
    step = exact_step("exploit", 4, [3], range(4), range(4))
    assert selective_seconds(model, Setup(), "resident", step, WORK, RATES).compute == 20 + 0 + 4


def test_a_host_step_waits_for_gradients_adam_and_weights():
    offloaded = Setup(offload_optimizer="cpu")
    taken = seconds(offloaded, "host", 2)
    # 6 gradients of 4 bytes go under 30 s of computing; then 6 x 28 bytes at 28 a second, and 6 weights of 2 bytes.
    assert (taken.compute, taken.host_adam, taken.pcie, taken.update) == (30, 6, 12, 0)
    slow = seconds(offloaded, "host", 2, rates=replace(RATES, is_pinned=False))
    assert slow.pcie == (24 / 0.5 - 30) + 12 / 0.5


def test_visiting_states_come_under_an_exploit_step_and_after_an_explore_step():
    taken = seconds(Setup(), "accelerator", 2)
    assert (taken.compute, taken.update, taken.pcie, taken.host_adam) == (30, 6, 6 * 12 - 30, 0)
    explore = exact_step("explore", 3, [2], range(3), range(3))
    late = selective_seconds(TIED, Setup(), "accelerator", explore, WORK, RATES)
    assert (late.compute, late.pcie) == (20 + 20 + 20, 6 * 12)
    stays = selective_seconds(TIED, Setup(), "accelerator", exploit(2, resident=(2,)), WORK, RATES)
    assert stays.pcie == 0 and stays.total == 30 + 6


def test_nvme_is_read_and_written_after_backward_while_adam_runs():
    setup = Setup(stage=3, offload_optimizer="nvme", persistence_threshold_numel=0)
    taken = seconds(setup, "host", 2)
    assert (taken.nvme, taken.host_adam) == (2 * 6 * 12 / 12, 0)
    assert seconds(setup, "host", 2, rates=replace(RATES, nvme_bytes=100.0)).host_adam == 6


def test_weights_on_the_host_are_fetched_under_the_computing():
    setup = Setup(stage=3, offload_optimizer="cpu", offload_param="cpu", persistence_threshold_numel=0)
    taken = seconds(setup, "host", 2)
    # Forward fetches 20 weights and backward 6, of 2 bytes; 6 gradients go to the host in bf16, and back, and in fp32.
    assert taken.pcie == pytest.approx(max(0, 26 * 2 + 6 * 2 - 30))


def test_ranks_share_the_link_between_cards_and_the_host():
    setup = Setup(stage=2, ranks=2, offload_optimizer="cpu")
    taken = seconds(setup, "host", 2)
    # 8 padded weights are gathered, 6 gradients all-reduced, of 2 bytes; half of each goes over the wire.
    assert taken.ranks == (8 * 2 + 2 * 6 * 2) / 2 / 4
    assert taken.host_adam == 6  # half of the block each, by half of the memory's rate


def test_a_mean_and_a_limit():
    one, other = Seconds(compute=2.0, pcie=1.0), Seconds(pcie=5.0)
    mean = one.mixed(other, 0.25)
    assert (mean.compute, mean.pcie, mean.total) == (1.5, 2.0, 3.5)
    assert mean.limit == "pcie" and one.limit == "compute"


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-4b", "gemma-3-1b", "phi-4-mini", "olmo-2-7b", "gpt2"])
def test_activations_are_what_autograd_keeps(name):
    """A small model of the same build, on the CPU, against the count on the meta device: within 10 %."""
    fields = dict(known_models()[name])
    kind = fields.pop("model_type")
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
             "n_embd": 256, "n_head": 4, "head_dim": 64, "attn_pdrop": 0.0}  # fmt: skip
    fields |= {key: value for key, value in small.items() if key in fields or (key == "attn_pdrop" and kind == "gpt2")}
    fields |= {"vocab_size": 512, "pad_token_id": 0, "n_layer" if kind == "gpt2" else "num_hidden_layers": 4}
    config = AutoConfig.for_model(kind, **fields)
    real = AutoModelForCausalLM.from_config(config).bfloat16().train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = real(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    kept.pop(output.logits.untyped_storage().data_ptr(), None)
    with torch.device("meta"):
        counted = activations_of(AutoModelForCausalLM.from_config(config))
    assert (counted.layers, counted.input_bytes) == (4, 2 * 256)
    assert counted.saved_bytes * tokens == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.1)
    assert counted.peak_bytes(100, checkpointing=True) < counted.peak_bytes(100, checkpointing=False)


def test_a_model_that_can_not_run_on_meta_is_estimated_by_its_linear_layers(monkeypatch):
    def fail(model):
        raise NotImplementedError

    monkeypatch.setattr("ds_agsel.estimate.activations._counted", fail)
    config = AutoConfig.for_model("llama", **{k: v for k, v in known_models()["smollm2"].items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    per_layer = (576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3  # q, o; k, v; gate, up, down
    assert activations_of(model).saved_bytes == pytest.approx(1.6 * 2 * 30 * per_layer)


def test_fractions_of_a_step_are_exact():
    from ds_agsel.estimate.steps import weighted

    shares = [Fraction(1, 3), Fraction(1), Fraction(1, 3), Fraction(0)]
    assert weighted(shares, [1, 5, 2, 100]) == Fraction(1, 3) * 3 + 5
