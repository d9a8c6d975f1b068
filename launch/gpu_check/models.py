"""Random-weight models of known shapes, their batches, and engines for the methods that the check compares."""

from __future__ import annotations

import gc
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_agsel.estimate.models import known_models
from ds_agsel.zero import compat

from .parts import Size

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": True,
}  # fmt: skip
LEARNING_RATE = 1e-4
_made: list[Any] = []  # by `engine_of`


class Unavailable(Exception):
    """What a case needs is not on this machine; the report says so, and no check has failed."""


def random_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Return the causal language model ``name`` with random weights, on the accelerator."""
    import transformers

    fields = dict(TINY if name == "tiny" else known_models()[name])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(get_accelerator().current_device_name()):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(dtype).train()


def tokens(model: nn.Module, size: Size, step: int) -> torch.Tensor:
    """Return batch number ``step`` on the accelerator: int64, (micro_batch, sequence_length)."""
    generator = torch.Generator().manual_seed(step)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    batch = torch.randint(vocabulary, (size.micro_batch, size.sequence_length), generator=generator)
    return batch.to(get_accelerator().current_device_name())


def ds_config(size: Size, stage: int, precision: str, offload: str = "none") -> dict[str, Any]:
    """Return a ds_config without the section."""
    return {
        "train_micro_batch_size_per_gpu": size.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload, "pin_memory": True}},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.01}},
        "steps_per_print": 1_000_000,
    }


def section(percent: int, phase: str, **fields: Any) -> dict[str, Any]:
    """Return a section of which every step is of ``phase``."""
    explore = {"explore_rate": 1, "explore_decay": 0, "steps_per_epoch": 10**9}
    return {"select_percent": percent, **(explore if phase == "explore" else {"explore_rate": 0}), **fields}


def engine_of(model: nn.Module, config: dict[str, Any]) -> Any:
    """Return an engine for ``model``; plain DeepSpeed's where ``config`` has no section."""
    import ds_agsel

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = ds_agsel.initialize(model=model, model_parameters=parameters, config=config)[0]
    _made.append(engine)
    return engine


def destroy_all() -> None:
    """Free the memory of all engines that `engine_of` made, on the accelerator and page-locked."""
    while _made:
        _made.pop().destroy()
    for _ in range(2):  # the first runs finalizers
        gc.collect()
    get_accelerator().empty_cache()
    compat.give_back_page_locked()


def with_lora(model: Any, rank: int) -> Any:
    """Return ``model`` with LoRA adapters on every linear layer of its layers, and all else frozen."""
    try:
        import peft
    except ImportError:
        raise Unavailable("peft is not installed: pip install peft") from None
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))


def take_step(engine: Any, batch: torch.Tensor) -> torch.Tensor:
    """Take a training step; return its loss on the device."""
    loss: torch.Tensor = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def wait() -> None:
    """Wait for the accelerator."""
    get_accelerator().synchronize()


def has_own_memory() -> bool:
    """Return whether the accelerator is other than the CPU."""
    return bool(get_accelerator().device_name() != "cpu")
