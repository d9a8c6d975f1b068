"""Test whether a model keeps the examples of a packed row apart, by running it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_agsel.errors import ConfigError

from .batches import collate

_EXAMPLES_NUMEL = (9, 6, 11)  # tokens of the examples that are tried; more than a convolution's kernel each
# Share of an output's norm that may differ. Other shapes sum in another order: about 1e-6 a layer in fp32. A layer that
# hands something over from one example to the next differs by 1e-2 and more in the first tokens after the border.
_TOLERANCE = 1e-3
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def check(model: PreTrainedModel, name: str, longest: int) -> None:
    """Raise ConfigError, with the layer, where ``model`` computes packed rows otherwise than each example alone.

    ``longest`` is the number of tokens of the longest example: a window or chunk of attention as long changes nothing,
    a shorter one is not in the mask of packed rows. Two forwards of 26 tokens in the model's own precision; the
    weights, gradients and mode of ``model`` stay as they are.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    if attention != "sdpa":
        raise ConfigError(
            f"--packing needs a model with sdpa attention, to keep the examples of a row apart; "
            f"{name} has {attention!r}. Leave it out."
        )
    _check_windows(model, name, longest)
    _try(model, name)


def _check_windows(model: PreTrainedModel, name: str, longest: int) -> None:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    for kind, setting in _WINDOWS.items():
        window = getattr(config, setting, None)
        if window is None or longest <= window or (kinds is not None and kind not in kinds):
            continue
        if kind == "sliding_attention" and getattr(config, "use_sliding_window", True) is False:
            continue
        layer = kinds.index(kind) if kinds is not None else 0
        raise ConfigError(
            f"--packing: layer {layer} of {name} has {kind} over {window} tokens, and the longest example has "
            f"{longest}; packed, it would see all of them. Use --sequence-length={window}, or leave --packing out."
        )


def _try(model: PreTrainedModel, name: str) -> None:
    examples = _examples(int(model.config.get_text_config().vocab_size))
    device = next(model.parameters()).device
    with _quiet(model):
        alone = []
        for example in examples:
            outputs, _ = _outputs(model, name, collate([[example]], 0), device)
            alone.append(outputs)
        packed, order = _outputs(model, name, collate([examples], 0, packed=True), device)
    starts = [sum(_EXAMPLES_NUMEL[:index]) for index in range(len(_EXAMPLES_NUMEL))]
    for module in order:
        for number, outputs in enumerate(alone):
            if module not in outputs:
                continue
            start, length = starts[number], _EXAMPLES_NUMEL[number]
            together = packed[module][:, start : start + length]
            if together.shape == outputs[module].shape and _differ(together, outputs[module]):
                raise ConfigError(
                    f"--packing: {_called(model, module)} of {name} lets the examples of a row see each other. "
                    "Leave --packing out."
                )


def _examples(vocabulary: int) -> list[Mapping[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(min(4, vocabulary - 1), vocabulary, (n,), generator=generator) for n in _EXAMPLES_NUMEL]
    return [{"input_ids": ids.tolist(), "prompt_numel": 1} for ids in drawn]


def _outputs(
    model: PreTrainedModel, name: str, batch: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], list[str]]:
    """Return each module's output of shape (1, T, …) by its name, and the names in the order of their ends."""
    numel = batch["input_ids"].shape[1]
    found: dict[str, Tensor] = {}

    def keep(module_name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = next(iter(output.values()), None) if isinstance(output, Mapping) else output
            tensor = tensor[0] if isinstance(tensor, tuple) and tensor else tensor
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[:2] == (1, numel):
                found[module_name] = tensor.detach()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    try:
        model(**inputs, use_cache=False)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(f"--packing: {name} can't take packed rows: {text}. Leave --packing out.") from error
    finally:
        for handle in handles:
            handle.remove()
    return found, list(found)


@contextmanager
def _quiet(model: PreTrainedModel) -> Any:
    """No gradients and no dropout inside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _differ(left: Tensor, right: Tensor) -> bool:
    return bool((left.float() - right.float()).norm() > _TOLERANCE * right.float().norm())


def _called(model: PreTrainedModel, module: str) -> str:
    """Return the layer that ``module`` stands for: itself, or, for a part without parts of its own, what it is in."""
    if not list(model.get_submodule(module).children()):
        module = module.rpartition(".")[0]
    return f"{module} ({type(model.get_submodule(module)).__name__})" if module else "the model"
