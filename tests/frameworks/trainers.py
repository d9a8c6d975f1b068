"""HF Trainer runs of a tiny Llama, for the tests beside it; each function runs on every rank of a worker group."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import ds_agsel
from ds_agsel.hf import SelectionCallback

ROWS, VOCABULARY, NEVER = 21, 64, "model.layers.1"
SECTION = {"select_percent": 40, "never_select": [NEVER], "explore_decay": 0.2}
AUTO_OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
AUTO_SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "total_num_steps": "auto",
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
    },
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                pad_token_id=0,
            )
        )


def tiny_other(name: str) -> PreTrainedModel:
    """An encoder with a classifier on it, or GPT-2, whose Linears are Conv1Ds."""
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "bert":
            return BertForSequenceClassification(BertConfig(**small))
        if name == "roberta":
            return RobertaForSequenceClassification(RobertaConfig(**small))
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        shape = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, **ends)
        return GPT2LMHeadModel(shape)


def rows(number: int = ROWS, architecture: str = "llama") -> list[dict[str, Any]]:
    """Rows of 12 tokens; for an encoder each has a class, by its first token."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokens = [torch.randint(1, VOCABULARY, (12,)).tolist() for _ in range(number)]
    if architecture in ("bert", "roberta"):
        return [{"input_ids": row, "labels": int(row[0] > VOCABULARY // 2)} for row in tokens]
    return [{"input_ids": row, "labels": row} for row in tokens]


def ds_config(
    stage: int = 2,
    offload: str = "none",
    section: Mapping[str, Any] | None = SECTION,
    optimizer: Mapping[str, Any] | None = AUTO_OPTIMIZER,
    scheduler: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A ds_config as HF's documentation has it, all "auto"."""
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    optional = {"adagrad_select": section, "optimizer": optimizer, "scheduler": scheduler}
    config.update({name: copy.deepcopy(value) for name, value in optional.items() if value is not None})
    return config


def forget_accelerate() -> None:
    """Accelerate keeps one state a process, for all runs in it; transformers keeps the ds_config."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def see_all_ranks() -> None:
    """On a CPU, Accelerate under DeepSpeed takes each rank for the only one unless it is told the backend."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def arguments(folder: Path, deepspeed: Mapping[str, Any] | None, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "deepspeed": copy.deepcopy(deepspeed),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,  # transformers 4 fills "auto" with 0, which DeepSpeed's schedulers refuse
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),  # else each rank takes itself for the only one
    }
    return TrainingArguments(**{**settings, **changes})


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What a test looks at. ``history`` is None where plain DeepSpeed trained."""
    engine = trainer.model_wrapped
    selection = getattr(engine, "selection", None)
    result = {
        "engine": type(engine).__name__,
        "weights": {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
        "global_step": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "groups": [{key: group[key] for key in ("lr", "weight_decay")} for group in engine.optimizer.param_groups],
        "history": None,
    }
    if selection is not None:
        result |= {
            "history": selection.history,
            "counts": selection.update_counts,
            "blocks": {block.name: block.parameter_names for block in selection.blocks},
            "steps_per_epoch": selection.policy.context.steps_per_epoch,
        }
    return result


class Heard(logging.Handler):
    """What ds_agsel's logger said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def train(
    folder: Path,
    deepspeed: Mapping[str, Any] | None,
    *,
    install: bool = True,
    resume: str | None = None,
    num_rows: int = ROWS,
    callback: bool = True,
    optimizers: str | None = None,
    architecture: str = "llama",
    **changes: Any,
) -> dict[str, Any]:
    """A Trainer's run; ``optimizers="sgd"`` or "adamw" hands it one made by the user."""
    forget_accelerate()
    model = tiny_llama() if architecture == "llama" else tiny_other(architecture)
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    more = {} if optimizers is None else {"optimizers": (made[optimizers](model.parameters(), lr=0.0123), None)}
    heard = Heard()
    logging.getLogger("ds_agsel").addHandler(heard)
    if install:
        ds_agsel.install()
    try:
        trainer = Trainer(
            model=model,
            args=arguments(folder, deepspeed, **changes),
            train_dataset=rows(num_rows, architecture),
            eval_dataset=rows(4, architecture),
            callbacks=[SelectionCallback()] if callback else None,
            **more,
        )
        trainer.train(resume_from_checkpoint=resume)
        return {**outcome(trainer), "said": heard.said}
    finally:
        logging.getLogger("ds_agsel").removeHandler(heard)
        ds_agsel.uninstall()


def run_example(script: Path, *words: str) -> list[int] | None:
    """The update counts that an example prints, run in this process as its own main program."""
    forget_accelerate()
    said = io.StringIO()
    argv, sys.argv = sys.argv, [str(script), *words]
    sys.path.insert(0, str(script.parent))
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv
        sys.path.remove(str(script.parent))
        ds_agsel.uninstall()
    found = [line for line in said.getvalue().splitlines() if line.startswith("update counts:")]
    return json.loads(found[0].removeprefix("update counts:")) if found else None


def assert_engaged(run: Mapping[str, Any], start: Mapping[str, torch.Tensor], never: str = NEVER) -> None:
    """Selection was engaged: a record a step, counts that agree, and a block that was never drawn has not moved."""
    assert len(run["history"]) == run["global_step"] > 0
    chosen = [block for record in run["history"] for block in record.blocks]
    assert list(run["counts"]) == [chosen.count(index) for index in range(len(run["counts"]))]
    phases = {record.phase for record in run["history"]}
    assert phases == {"explore", "exploit"}
    for index, (name, parameters) in enumerate(run["blocks"].items()):
        for parameter in parameters:
            moved = not torch.equal(start[parameter], run["weights"][parameter])
            assert moved == (run["counts"][index] > 0), (name, parameter)
    assert run["counts"][list(run["blocks"]).index(never)] == 0
