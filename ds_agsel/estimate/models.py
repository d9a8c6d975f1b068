"""Models by file, by a name known here or by hub name: their configs, and the model itself without weights.

Neither torch nor transformers is loaded before a model is known to be there, so that a wrong name is answered at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ds_agsel.config import did_you_mean
from ds_agsel.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

HUB_SECONDS = 1.0  # after which a hub that doesn't answer counts as out of reach
# Organisations that publish copies of others' models under their names.
_MIRRORS = ("unsloth", "nousresearch")
# Endings for the same shape trained otherwise, or stored otherwise.
_VARIANTS = re.compile(r"-(hf|base|instruct|chat|it|pt)(?=-|$)")


def build_on_meta(model: str) -> nn.Module:
    """Build ``model`` without weights from a config.json, a folder with one, a name in `known_models` or a hub name.

    It is the class of transformers that the config's ``architectures`` names, and where it names none the causal
    language model of its type. Raises ConfigError if there is no such model, or none can be built.
    """
    require_model(model)
    import torch
    import transformers

    config = _read_config(model)
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    architecture: Any = getattr(transformers, str(named), None)
    is_model = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    try:
        with torch.device("meta"):
            if is_model:
                built: nn.Module = architecture._from_config(config)
            else:
                built = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # errors of config values that no layer, or no memory, can hold
        what = named if is_model else "causal language model"
        raise ConfigError(
            f"--model={model}: no {what} can be built from its config: {_reason(error)} Use the config.json of one."
        ) from error
    return built


# --------------------------------------------------------------------- known models


def known_models() -> dict[str, dict[str, Any]]:
    """Return the configs that need no hub, by the model's short name in lower case."""
    return {name: entry["config"] for name, entry in _known().items()}


def known_name(model: str) -> str | None:
    """Return the short name of a known model, by its short or hub name in any case; None if it isn't known.

    ``-Instruct`` and the like may be left out or added. A hub name's organisation must be one that publishes the model.
    """
    return _by_spelling().get(_spelling(model))


@cache
def _known() -> dict[str, dict[str, Any]]:
    text = resources.files("ds_agsel.estimate").joinpath("known_models.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


@cache
def _by_spelling() -> dict[str, str]:
    found = {}
    for name, entry in _known().items():
        for spelling in {name, *map(_spelling, entry["names"])}:
            found[spelling] = name
            owner, _, short = spelling.rpartition("/")
            if owner:
                found |= {f"{mirror}/{short}": name for mirror in _MIRRORS}
                found.setdefault(short, name)
    return found


def _spelling(model: str) -> str:
    owner, slash, short = model.lower().rpartition("/")
    return owner + slash + _VARIANTS.sub("", short.removeprefix("meta-"))


# ------------------------------------------------------------------------- the hub


def require_model(model: str) -> None:
    """Raise ConfigError if ``model`` is no file, isn't known here, and no hub can be asked about it now."""
    if _is_path(model):
        path = _config_path(model)
        if not path.is_file():
            raise ConfigError(
                f"--model={model}: there is no file {path}. Give a model's config.json, the folder that has it, "
                "or a name."
            )
    elif known_name(model) is None and not _is_cached(model):
        reason = _hub_problem()
        if reason:
            raise _no_model(model, reason)


def _is_path(model: str) -> bool:
    path = Path(model)
    named = path.suffix == ".json" or path.name == "config.json" or model.startswith((".", "/", "~"))
    return named or _config_path(model).is_file()


def _config_path(model: str) -> Path:
    path = Path(model)
    return path / "config.json" if path.is_dir() else path


def _is_cached(model: str) -> bool:
    """Return whether the hub client has the config of ``model`` on this machine."""
    import huggingface_hub

    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str)
    except huggingface_hub.errors.HFValidationError:
        return False


def _hub_problem() -> str | None:
    """Return why the hub, or the proxy on the way to it, can't be asked; None if something answers there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set."
    scheme = urlsplit(constants.ENDPOINT).scheme
    way = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY") or constants.ENDPOINT
    place = urlsplit(way if "//" in way else f"//{way}")
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
    except ValueError:
        return None  # the hub client's own error says what is wrong with it
    answers: list[bool] = []
    # On a thread: looking a name up has no timeout of its own.
    asking = threading.Thread(target=_knock, args=(place.hostname or "", port, answers), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return None if answers else f"{place.hostname} doesn't answer."


def _knock(host: str, port: int, answers: list[bool]) -> None:
    with contextlib.suppress(OSError, UnicodeError):
        socket.create_connection((host, port), timeout=HUB_SECONDS).close()
        answers.append(True)


def _no_model(model: str, reason: str) -> ConfigError:
    known = known_models()
    return ConfigError(
        f"--model={model} is neither a file, nor known here, nor to be had from the hub: {reason}"
        f"{did_you_mean(model.rpartition('/')[2], known)} Give its config.json, or a name known here: "
        f"{', '.join(known)}."
    )


# --------------------------------------------------------------------- its config


def _read_config(model: str) -> Any:
    from transformers import AutoConfig

    if _is_path(model):
        return _config_from(model, _read_json(model, _config_path(model)))
    known = known_name(model)
    if known is not None:
        return _config_from(model, known_models()[known])
    try:
        return AutoConfig.from_pretrained(model, local_files_only=_is_cached(model))
    except Exception as error:  # the hub client's own errors are many, and differ from release to release
        raise _no_model(model, _reason(error)) from error


def _read_json(model: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--model={model}: {path} is not JSON ({error}). Give a model's config.json.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f'--model={model}: {path} has no "model_type". Give a config.json made by save_pretrained.')
    return config


def _config_from(model: str, fields: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(fields["model_type"], **_with_special_floats(rest))
    except Exception as error:  # transformers checks values in classes of its own, which differ from release to release
        raise ConfigError(
            f"--model={model}: transformers can't read its config (model_type={fields['model_type']!r}): "
            f"{_reason(error)}"
        ) from error


def _with_special_floats(value: Any) -> Any:
    """Return ``value`` with transformers' ``{"__float__": "Infinity"}``, which JSON can't express, as the number."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_special_floats(inner) for key, inner in value.items()}
    return [_with_special_floats(inner) for inner in value] if isinstance(value, list) else value


def _reason(error: BaseException) -> str:
    """Return the innermost error's reason in one line: if a line ends in a colon, the next one is the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__}."
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    said = f"{said} is unknown" if isinstance(error, KeyError) else said
    return said if said.endswith((".", ")")) else f"{said}."
