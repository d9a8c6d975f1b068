"""Models known without a hub: their sizes are the published ones, their names resolve, a wrong one is told fast."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_agsel.errors import ConfigError
from ds_agsel.estimate import models
from ds_agsel.estimate.models import build_on_meta, known_models, known_name
from ds_agsel.estimate.shapes import read_shape

PUBLISHED = {name: entry["published_numel"] for name, entry in models._known().items()}


def numel(fields: dict[str, Any], layers: int) -> int:
    depth = "n_layer" if "n_layer" in fields else "num_hidden_layers"
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields["model_type"], **rest | {depth: layers}))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_size(name):
    """By the model with one layer and with two: its layers are alike in size."""
    fields = known_models()[name]
    layers = fields.get("num_hidden_layers") or fields["n_layer"]
    one, two = numel(fields, 1), numel(fields, 2)
    assert one + (layers - 1) * (two - one) == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", ["smollm2", "gemma-3-1b"])
def test_a_whole_model_has_its_published_size(name):
    shape = read_shape(name)
    assert shape.numel == PUBLISHED[name]
    assert sum(block.numel for block in shape.blocks) == sum(map(sum, shape.groups)) == shape.numel


def test_there_are_enough_of_them():
    assert len(PUBLISHED) >= 40


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("META-LLAMA/meta-llama-3.1-8b-INSTRUCT", "llama-3.1-8b"),
        ("unsloth/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2"),
        ("smollm2", "smollm2"),
        ("somebody/llama-3.1-8b", None),  # may be anything
        ("llama-3.1-9b", None),
    ],
)
def test_names_resolve_in_any_case(spelt, name):
    assert known_name(spelt) == name


def test_no_name_means_two_models():
    spellings: dict[str, str] = {}
    for name, entry in models._known().items():
        for spelling in {name, *map(models._spelling, entry["names"])}:
            assert spellings.setdefault(spelling, name) == name
    assert all(known_name(name) == name for name in PUBLISHED)


UNPLUGGED = """
import socket
def refuse(*arguments, **options): raise OSError("no network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from ds_agsel import cli
raise SystemExit(cli.main(["estimate", "--model", "nobody/llama-3.1-8c", "--ds-config", "configs/zero2.json"]))
"""


@pytest.mark.timeout(60)
def test_a_wrong_name_is_answered_in_two_seconds_without_a_network(request):
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", UNPLUGGED], cwd=request.config.rootpath, env=environment, capture_output=True, text=True
    )
    seconds = time.monotonic() - began
    assert done.returncode == 2
    assert 'Did you mean "llama-3.1-8b"?' in done.stderr and "Give its config.json" in done.stderr
    assert seconds < 2


def test_a_name_that_is_looked_up_for_ever_is_given_up_in_a_second(monkeypatch):
    """A resolver without a server waits far longer than a connection's timeout."""
    ended = threading.Event()

    def look_up(*_: Any, **__: Any) -> None:
        ended.wait(30)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"doesn't answer\."):
        models.require_model("nobody/nothing")
    assert time.monotonic() - began < 2
    ended.set()


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        build_on_meta("nobody/nothing")


def test_a_proxy_is_what_must_answer(monkeypatch):
    asked = []
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setattr(
        models, "_knock", lambda host, port, answers: (asked.append((host, port)), answers.append(True))
    )
    models.require_model("nobody/nothing")
    assert asked == [("proxy.example", 3128)]
