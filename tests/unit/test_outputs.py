"""A full disk: what stood in its place before stays, and the run says it in one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_agsel.errors import CheckpointError
from launch.training import outputs, process


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Writes fail past 2 KB of a file, as on a full disk (Python has SIGXFSZ ignored)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=64))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    folder = tmp_path / "model"
    outputs.save_model(model, model.state_dict(), tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    problem = r"could not be written to .*model: .* Make room, then --resume"
    with pytest.raises(CheckpointError, match=problem), no_room():
        outputs.save_model(model, model.state_dict(), tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_log_that_finds_no_room_ends_the_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    class Full:
        def __init__(self, *_: Any) -> None:
            raise OSError(number, "no room at all")

    monkeypatch.setattr(process, "_set_verbosity", lambda: None)
    for owner, name in (
        (process.StopRequest, "listen"),
        (process.build_ops, "announce"),
        (process.compat, "start_process_group"),
        (process.dist, "destroy_process_group"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: None)
    monkeypatch.setattr(process.job, "Job", Full)
    assert process.run_job(argparse.Namespace(output="runs/full")) == process.FAILED
    assert capsys.readouterr().err == (
        "\nerror: --output='runs/full' can't be written to: no room at all. Make room, then go on with --resume.\n"
    )
