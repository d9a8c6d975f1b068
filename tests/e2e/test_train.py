"""The main job through the real launcher: every ds_config of configs/, resuming, stopping, and bad input."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_agsel.ds_config import DsConfig, read_ds_config
from ds_agsel.report.runs import read_run
from ds_agsel.zero.support import missing_for_nvme

ROOT = Path(__file__).parents[2]
# Those for models too large for here are checked by the estimator: tests/unit/test_docs.py.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if "7b" not in path.name)
CORPUS = [f"{name} has {number} apples. How many? #### - + * =" for name in ("Ada", "Ben") for number in range(99)]

# A job of some steps on a tiny model; the time goes into starting it.
QUICK = {
    "--dataset": "builtin",
    "--train-rows": "160",
    "--validation-rows": "16",
    "--test-rows": "4",
    "--max-new-tokens": "4",
    "--evaluate-every": "0",
    "--micro-batch-size": "8",
    "--lr": "5e-3",
}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a vocabulary of some hundred tokens, as a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["[end]"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]", pad_token="[end]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def command(
    model: Path | str,
    output: Path,
    config: str,
    ranks: int,
    options: dict[str, str | None],
    script: str = "launch/train.py",
) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    settings = {"--model": str(model), "--output": str(output), **QUICK, **options}
    words = [word for name, value in settings.items() for word in ((name,) if value is None else (name, value))]
    return [*launcher, script, "--deepspeed_config", config, *words]


def environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **quiet, "PYTHONPATH": path}


def train(
    model: Path | str,
    output: Path,
    *,
    config: str = "configs/zero2_offload.json",
    ranks: int = 1,
    **options: str | None,
) -> subprocess.CompletedProcess[str]:
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return subprocess.run(
        command(model, output, config, ranks, named),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def error_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


# The main job's, and one for each home of states and for stage 3; the rest is in the slow sweep.
BY_DEFAULT = ("zero2_offload", "zero2_states_visit", "zero3", "zero3_nvme")


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=() if path.stem in BY_DEFAULT else pytest.mark.slow) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_every_config_trains_and_its_model_loads(config: Path, tiny_model: Path, tmp_path: Path) -> None:
    lacking = missing_for_nvme(DsConfig.of(read_ds_config(config)))
    if lacking:
        pytest.skip(" ".join(lacking))
    if "fp16" in json.loads(config.read_text()) and not get_accelerator().is_fp16_supported():
        pytest.skip(f"the accelerator {get_accelerator().device_name()!r} has no fp16")
    result = train(tiny_model, tmp_path, config=str(config.relative_to(ROOT)), steps="16")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss"]["validation_last"] < summary["loss"]["validation_first"] - 0.5
    assert "validation loss" in result.stdout and "seconds a step" in result.stdout
    assert result.stdout.count("adagrad_select: AdamW runs ") == 1
    records = [record for record in lines_of(tmp_path / "metrics.jsonl") if record["event"] == "train"]
    assert [record["step"] for record in records] == list(range(16))
    assert all(math.isfinite(record["loss"]) for record in records)

    section = json.loads(config.read_text())["adagrad_select"]
    applied = 16 - section.get("sparse_grad", {}).get("calibration_steps", 0)
    # 6 blocks, 20 %: one a step. Step 0 explores, as the explore rate is 1.
    selections = lines_of(tmp_path / "selection.jsonl")
    fields = {"step", "phase", "blocks", "explore_rate", "traffic", "state_bytes", "accelerator_state_bytes"}
    assert [set(selection) for selection in selections] == [fields] * applied
    run = read_run(tmp_path)
    assert run.problems == [] and run.is_finished and len(run.measured) == 16 and len(run.steps) == applied
    assert run.state_bytes()["measured"] == selections[-1]["state_bytes"] > 0
    for times in run.step_seconds().values():
        assert sum(times[part] for part in ("forward", "backward", "step")) > 0
    assert selections[0]["phase"] == "explore" and all(len(selection["blocks"]) == 1 for selection in selections)
    assert summary["selection"]["explore_steps"] + summary["selection"]["exploit_steps"] == applied

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = tokenizer("Ada has", return_tensors="pt")
    assert model.generate(prompt.input_ids, max_new_tokens=2).shape[1] > prompt.input_ids.shape[1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


RESUMED = {"steps": "12", "checkpoint_every": "3", "keep_checkpoints": "4", "evaluate_every": "6", "accumulation": "2"}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that went through."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result = train(tiny_model, output, ranks=2, **RESUMED)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return output


def assert_same_run(resumed: Path, whole: Path) -> None:
    """Logs, model and the last checkpoint's optimizer states are equal, bit for bit."""

    def logged(output: Path) -> list[dict[str, Any]]:
        timed = ("seconds", "forward_seconds", "backward_seconds", "step_seconds", "processor_seconds")
        return [
            {key: value for key, value in record.items() if key not in timed}
            for record in lines_of(output / "metrics.jsonl")
        ]

    assert logged(resumed) == logged(whole)
    assert (resumed / "selection.jsonl").read_text() == (whole / "selection.jsonl").read_text()
    ours, theirs = (load_file(output / "model" / "model.safetensors") for output in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for rank in (0, 1):
        states = [
            next((output / "checkpoints" / "step00000012").glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))
            for output in (resumed, whole)
        ]
        ours, theirs = (torch.load(path, weights_only=False)["optimizer_state_dict"] for path in states)
        assert_equal(ours["base_optimizer_state"], theirs["base_optimizer_state"])
        assert_equal(ours["single_partition_of_fp32_groups"], theirs["single_partition_of_fp32_groups"])


def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(
    tiny_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    # As if killed after step 6: the later checkpoints are broken, the logs have lines of steps to be done again.
    resumed = tmp_path / "resumed"
    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "model")
    (resumed / "summary.json").unlink()
    (resumed / "checkpoints" / "step00000012" / "manifest.json").unlink()
    broken = next((resumed / "checkpoints" / "step00000009").glob("*zero_pp_rank_1_*"))
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    second = train(tiny_model, resumed, ranks=2, resume=None, **RESUMED)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-4000:]
    assert "going on from" in second.stdout and "step00000006" in second.stdout
    told = second.stdout
    assert "LOADING" in told and "step00000012 (no manifest.json" in told and f"{broken.name} has changed" in told
    assert_same_run(resumed, uninterrupted)


def test_a_rank_that_is_killed_ends_the_others_and_a_resume_goes_on(
    tiny_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log.txt"
    options = {f"--{name.replace('_', '-')}": value for name, value in RESUMED.items()}
    with launched(command(tiny_model, output, "configs/zero2_offload.json", 2, options), log) as process:
        wait_until(lambda: (output / "checkpoints" / "step00000006").exists(), process, log)
        [victim] = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child, 1)]
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(timeout=60) != 0
        while group_is_alive(process.pid):
            assert time.monotonic() < killed + 60, log.read_text()[-4000:]
            time.sleep(0.2)
    assert not (output / "model").exists()
    resumed = train(tiny_model, output, ranks=2, resume=None, **RESUMED)
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-4000:]
    assert "step00000003, after 3" in resumed.stdout or "step00000006, after 6" in resumed.stdout
    assert_same_run(output, uninterrupted)


def is_rank(process: psutil.Process, rank: int) -> bool:
    try:
        return "launch/train.py" in process.cmdline() and process.environ().get("RANK") == str(rank)
    except psutil.Error:
        return False


def assert_equal(ours: Any, theirs: Any) -> None:
    """Raise AssertionError unless both are made alike of equal values, tensors bit for bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_equal(one, other)
    else:
        assert ours == theirs


@pytest.mark.slow
def test_the_same_seed_makes_two_runs_identical_and_another_one_does_not(tiny_model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(tiny_model, tmp_path / name, steps="6", seed=seed).returncode == 0
    a, b, c = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@contextlib.contextmanager
def launched(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher in a process group of its own, which is killed at the end at the latest."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("ranks", "sent"),
    [(2, signal.SIGTERM), pytest.param(1, signal.SIGINT, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_stop_signal_saves_and_leaves(tiny_model: Path, tmp_path: Path, ranks: int, sent: signal.Signals) -> None:
    output, log = tmp_path / "run", tmp_path / "log.txt"
    options = {"--steps": "100000", "--test-rows": "0"}
    selections = output / "selection.jsonl"
    with launched(command(tiny_model, output, "configs/zero2_offload.json", ranks, options), log) as process:
        wait_until(lambda: selections.is_file() and len(lines_of(selections)) >= 3, process, log)
        os.killpg(process.pid, sent)
        assert process.wait(timeout=60) != 0
        deadline = time.monotonic() + 60
        while group_is_alive(process.pid):
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
    assert f"stopped by {sent.name} after" in log.read_text()
    assert 'launch/train.py", line' not in log.read_text()  # the launcher itself dies of a SIGINT with a traceback
    [checkpoint] = [path for path in (output / "checkpoints").iterdir() if path.is_dir()]
    assert (checkpoint / "manifest.json").is_file()
    assert int(checkpoint.name.removeprefix("step")) == len(lines_of(output / "selection.jsonl"))
    assert not (output / "model").exists()


def test_an_interrupt_whose_log_has_no_reader_any_more_still_saves(tiny_model: Path, tmp_path: Path) -> None:
    """Ctrl-C under ``2>&1 | tee log`` ends tee, too: the pipe is broken before the save."""
    output = tmp_path / "run"
    selections = output / "selection.jsonl"
    words = command(tiny_model, output, "configs/zero2_offload.json", 1, {"--steps": "100000", "--test-rows": "0"})
    reader, writer = os.pipe()
    log = subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL)
    os.close(reader)
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=writer, stderr=subprocess.STDOUT, start_new_session=True
    )
    os.close(writer)
    try:
        deadline = time.monotonic() + 150
        while not (selections.is_file() and len(lines_of(selections)) >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        log.kill()
        log.wait()
        os.killpg(process.pid, signal.SIGINT)
        deadline = time.monotonic() + 60
        while group_is_alive(process.pid):
            process.poll()
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        log.kill()
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    [checkpoint] = [path for path in (output / "checkpoints").iterdir() if path.is_dir()]
    assert (checkpoint / "manifest.json").is_file()
    assert int(checkpoint.name.removeprefix("step")) == len(lines_of(selections))


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_malformed_data_gives_one_clear_line_on_two_ranks(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer"\n')
    result = train(tiny_model, tmp_path / "run", ranks=2, dataset=str(file))
    assert result.returncode != 0
    [line] = error_lines(result)
    assert line.startswith(f"error: {file} can't be read: line 2 is no valid JSON")
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten_unasked(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "train"}\n')
    result = train(tiny_model, tmp_path)
    assert result.returncode != 0
    [line] = error_lines(result)
    assert "holds an earlier run. Use --resume to go on with it, --overwrite" in line
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "train"}\n'


def test_a_loss_that_stays_non_finite_stops_the_run_and_says_where(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    model = LlamaForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(broken)
    result = train(broken, tmp_path / "run", steps="10", max_nonfinite="2", test_rows="0", validation_rows="0")
    assert result.returncode != 0
    [line] = error_lines(result)
    assert "The loss was nan at step 2 (epoch 0, lr" in line and "the 3. non-finite one in a row" in line
    assert "--max-nonfinite=2" in line and "training rows" in line


@pytest.mark.slow
def test_packing_and_gradient_checkpointing_train_too(tiny_model: Path, tmp_path: Path) -> None:
    result = train(
        tiny_model,
        tmp_path,
        steps="12",
        packing=None,
        gradient_checkpointing=None,
        sequence_length="256",
        micro_batch_size="2",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    loss = json.loads((tmp_path / "summary.json").read_text())["loss"]
    assert loss["validation_last"] < loss["validation_first"] - 0.5
