"""What is no model is refused by its name, with what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_agsel.errors import ConfigError
from launch.training import models


@pytest.mark.parametrize("load", [models.load_tokenizer, models.load_model])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path))
    assert str(caught.value) == (
        f"model={str(tmp_path)!r} is a folder without a config.json. Use a folder made by save_pretrained."
    )


@pytest.mark.parametrize("load", [models.load_tokenizer, models.load_model])
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model='no/such-model' can't be loaded: .* or 'smollm2'\."):
        load("no/such-model")
