"""A process of the benchmark with one row or several: one of them takes a training step each time the parent says so.

`benchmark.py` starts `serve` in a new process and sends ``(row, batch, blocks)`` for each step; the answers are
dicts: first, for each row, the sizes of the blocks, then one per step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ds_agsel
from ds_agsel.blocks import Block, find_blocks
from ds_agsel.selection import Selection
from ds_agsel.zero.adapters import adapter_for
from ds_agsel.zero.states import visits
from ds_agsel.zero.states.home import moment_bytes
from ds_agsel.zero.window import StepWindow

from ..training.costs import peak_resident_bytes, reset_peak_resident
from .rows import FLOOR, section

RESET = "reset"  # the command that ends the warm-up: it resets the peak of memory

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIPPING = 1.0
_STATE_BYTES = 16  # of a parameter, at most: master weight and moments in fp32, and what each block is padded by

_PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A Llama model with tied embeddings. Defaults: SmolLM2-135M."""

    hidden_size: int = 576
    intermediate_size: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocab_size: int = 49152


@dataclass(frozen=True)
class Workload:
    """What all rows of a run have in common."""

    shape: Shape
    micro_batch: int
    sequence_length: int
    precision: str
    offload: str
    seed: int
    stage: int = 2

    @property
    def mode(self) -> str:
        """The stage and the offload as text."""
        return f"ZeRO-{self.stage}, offload_optimizer {self.offload}"

    def model(self) -> LlamaForCausalLM:
        """Return the model, with random weights, in the workload's precision."""
        torch.manual_seed(self.seed)
        shape = self.shape
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(2048, self.sequence_length),
            tie_word_embeddings=True,
            use_cache=False,
        )
        return LlamaForCausalLM(config).to(_PRECISIONS[self.precision]).train()

    def tokens(self, batch: int) -> torch.Tensor:
        """Return batch number ``batch``: int64, (micro_batch, sequence_length), the same in every row."""
        generator = torch.Generator().manual_seed(self.seed * 100003 + batch)
        size = (self.micro_batch, self.sequence_length)
        return torch.randint(0, self.shape.vocab_size, size, generator=generator)

    def ds_config(self) -> dict[str, Any]:
        """Return the workload's ds_config, without the section."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_clipping": CLIPPING,
            "bf16": {"enabled": self.precision == "bf16"},
            "zero_optimization": {
                "stage": self.stage,
                "offload_optimizer": {"device": self.offload, "pin_memory": True},
                "reduce_bucket_size": 16_000_000,
                "allgather_bucket_size": 16_000_000,
                "overlap_comm": False,
                "contiguous_gradients": True,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}},
            "steps_per_print": 1_000_000,
        }


class Stopwatch:
    """Seconds of the phases of a step, by name. Waits for the accelerator at both ends of each.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of the processor, of all threads.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Any:
        """Time the block inside as phase ``name``."""
        get_accelerator().synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        get_accelerator().synchronize()
        self.seconds[name] = time.perf_counter() - start
        self.cpu_seconds[name] = time.process_time() - cpu_start


class PlanningClock:
    """Host seconds that ds_agsel spends on choosing, freezing and planning moves, since the last `take`.

    It replaces functions of classes, so a process has one, made before its engines.
    """

    TIMED = (
        (StepWindow, "prepare"), (Selection, "choose"), (Selection, "commit"), (visits, "plan_moves"),
    )  # fmt: skip

    def __init__(self) -> None:
        self._seconds = 0.0
        for owner, name in self.TIMED:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - start

        return timed

    def take(self) -> float:
        """Return the seconds spent in the timed functions since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Trainer(Protocol):
    """What makes a row's steps."""

    blocks: tuple[Block, ...]

    def step(self, tokens: torch.Tensor, blocks: Sequence[int] | None) -> dict[str, Any]:
        """Take a training step and return its measurements. ``blocks``: the choice of the row that is followed."""

    def start_measuring(self) -> None:
        """End the warm-up."""


def with_room_for_all(section: dict[str, Any], numel: int) -> dict[str, Any]:
    """Return ``section`` with room for the states of all ``numel`` parameters, unless it says where they are updated.

    On an accelerator without offload states visit by default. Rows that do not name that are about the rest of a
    step, and are compared with `FloorTrainer`, whose states stay.
    """
    return section if "step_device" in section else {**section, "state_budget_bytes": _STATE_BYTES * numel}


class DeepSpeedTrainer:
    """DeepSpeed, plain or with ds_agsel."""

    def __init__(self, workload: Workload, section: dict[str, Any] | None) -> None:
        model = workload.model()
        self.blocks = find_blocks(model)
        self._selection: Selection | None = None
        self._most_gradient_bytes = 0
        self._look_at_gradients = [
            p.register_post_accumulate_grad_hook(lambda _: self._look()) for p in model.parameters()
        ]
        config = workload.ds_config()
        if section is not None:
            states_visit = workload.offload == "none" and get_accelerator().device_name() != "cpu"
            numel = sum(block.numel for block in self.blocks)
            config["adagrad_select"] = with_room_for_all(section, numel) if states_visit else section
        self._engine, self._optimizer, _, _ = ds_agsel.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        self._selection = getattr(self._engine, "selection", None)
        self._adapter = adapter_for(self._optimizer)  # its methods work on plain DeepSpeed's optimizer, too
        self.calibration_cpu_seconds = self._calibrate(workload)

    def _calibrate(self, workload: Workload) -> float:
        """Take the steps that change nothing, with `sparse_grad`; return their processor seconds."""
        start = time.process_time()
        while self._selection is not None and self._selection.sparse and self._selection.sparse.calibration_left:
            tokens = workload.tokens(-self._selection.sparse.calibration_left).to(self._engine.device)
            self._engine.backward(self._engine(input_ids=tokens, labels=tokens).loss)
            self._engine.step()
        return time.process_time() - start

    def start_measuring(self) -> None:
        """Remove the hooks that watched the warm-up's gradients: they would cost time."""
        for hook in self._look_at_gradients:
            hook.remove()

    def _look(self) -> None:
        if self._selection is not None and self._selection.plan.phase == "explore":
            held = sum(self._adapter.held_gradient_bytes(self._optimizer))
            self._most_gradient_bytes = max(self._most_gradient_bytes, held)

    def _state_bytes(self) -> int:
        """Return the bytes of Adam moments that exist, in the form in which they rest."""
        optimizer = self._optimizer
        return int(optimizer.state_bytes()) if hasattr(optimizer, "home") else moment_bytes(optimizer)

    def step(self, tokens: torch.Tensor, blocks: Sequence[int] | None) -> dict[str, Any]:
        """Take a step on ``tokens``; return its measurements. DeepSpeed's side ignores ``blocks``."""
        engine, watch = self._engine, Stopwatch()
        tokens = tokens.to(engine.device)
        with watch.phase("forward"):
            loss = engine(input_ids=tokens, labels=tokens).loss
        with watch.phase("backward"):
            engine.backward(loss)
        accelerator_bytes, host_bytes = self._adapter.held_gradient_bytes(self._optimizer)
        resident_bytes = self._optimizer.resident_state_bytes() if hasattr(self._optimizer, "home") else 0
        with watch.phase("optimizer"):
            engine.step()
        measured = {
            "seconds": watch.seconds,
            "loss": loss.item(),
            "accelerator_gradient_bytes": accelerator_bytes,
            "host_gradient_bytes": host_bytes,
            "state_bytes": self._state_bytes(),
            "resident_state_bytes": resident_bytes,
            "most_gradient_bytes": self._most_gradient_bytes,
            "calibration_cpu_seconds": self.calibration_cpu_seconds,
            "phase": "full",
            "blocks": [block.index for block in self.blocks],
            "updated_numel": sum(block.numel for block in self.blocks),
            "cpu_seconds_of": watch.cpu_seconds,
        }
        if self._selection is not None:
            record, plan = self._selection.history[-1], self._selection.plan
            measured["phase"], measured["blocks"] = record.phase, list(record.blocks)
            measured["updated_numel"] = sum(self._selection.blocks[block].numel for block in record.blocks)
            measured["planned_blocks"] = None if plan.blocks is None else list(plan.blocks)
            measured["traffic"] = asdict(self._selection.traffic[-1])
        return measured


class FloorTrainer:
    """A hand-written loop that does only the necessary work for the given blocks."""

    def __init__(self, workload: Workload) -> None:
        self._device = get_accelerator().current_device_name()
        self._model = workload.model().to(self._device)
        self.blocks = find_blocks(self._model)
        self._parameters = dict(self._model.named_parameters())
        master_device = "cpu" if workload.offload == "cpu" else self._device
        self._masters = {
            name: nn.Parameter(p.detach().to(master_device, torch.float32, copy=True))
            for name, p in self._parameters.items()
        }
        self._optimizer = torch.optim.AdamW(
            self._masters.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, tokens: torch.Tensor, blocks: Sequence[int] | None) -> dict[str, Any]:
        """Take a step on ``tokens`` that trains ``blocks`` (None: all); return its measurements."""
        chosen = range(len(self.blocks)) if blocks is None else blocks
        selected = {name for index in chosen for name in self.blocks[index].parameter_names}
        tokens, watch = tokens.to(self._device), Stopwatch()
        with watch.phase("forward"):
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(name in selected)
            loss = self._model(input_ids=tokens, labels=tokens).loss
        with watch.phase("backward"):
            loss.backward()
        gradients = [self._parameters[name].grad for name in selected]
        with watch.phase("optimizer"):
            self._update(selected)
        states = [v for state in self._optimizer.state.values() for k, v in state.items() if k != "step"]
        return {
            "seconds": watch.seconds,
            "loss": loss.item(),
            "accelerator_gradient_bytes": sum(g.numel() * g.element_size() for g in gradients if g is not None),
            "host_gradient_bytes": 0,
            "state_bytes": sum(state.numel() * state.element_size() for state in states),
            "phase": "exploit",
            "blocks": list(chosen),
            "updated_numel": sum(self.blocks[index].numel for index in chosen),
            "cpu_seconds_of": watch.cpu_seconds,
        }

    def start_measuring(self) -> None:
        """Change nothing: what a step does is the same in the warm-up."""

    @torch.no_grad()
    def _update(self, selected: set[str]) -> None:
        masters = [self._masters[name] for name in selected]
        for name in selected:
            parameter, master = self._parameters[name], self._masters[name]
            master.grad = parameter.grad.to(master.device, torch.float32)
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, CLIPPING)
        self._optimizer.step()
        for name in selected:
            self._parameters[name].copy_(self._masters[name])
            self._masters[name].grad = None


def peak_memory_bytes() -> dict[str, int]:
    """Return the peak resident memory since `reset_peak_memory`, and the accelerator's (0 on a CPU)."""
    accelerator = get_accelerator()
    on_host = accelerator.device_name() == "cpu"
    return {
        "resident": peak_resident_bytes(),
        "accelerator": 0 if on_host else accelerator.max_memory_allocated(),
    }


def reset_peak_memory() -> None:
    """Reset the peak, if the system can (Linux): earlier memory was not the steady state's."""
    reset_peak_resident()
    if get_accelerator().device_name() != "cpu":
        get_accelerator().reset_peak_memory_stats()


def serve(connection: Connection, rows: Sequence[str], workload: Workload, log: Path) -> None:
    """Run the process of ``rows`` until the parent closes the pipe. Writes what libraries print to ``log``."""
    with open(log, "w", encoding="utf-8") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    try:
        _serve(connection, rows, workload)
    except EOFError:
        pass  # the parent has gone
    except Exception as error:
        traceback.print_exc()
        connection.send({"error": f"{type(error).__name__}: {error}"})


def connect_alone() -> None:
    """Make this process a group of one rank, without an address, and DeepSpeed quiet."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    backend = get_accelerator().communication_backend_name()
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend)


def _serve(connection: Connection, rows: Sequence[str], workload: Workload) -> None:
    connect_alone()
    clock = PlanningClock()
    trainers: dict[str, Trainer] = {}
    for row in rows:
        trainers[row] = FloorTrainer(workload) if row == FLOOR else DeepSpeedTrainer(workload, section(row))
        connection.send({"block_numels": [block.numel for block in trainers[row].blocks]})
    while True:
        command = connection.recv()
        if command == RESET:
            reset_peak_memory()
            for trainer in trainers.values():
                trainer.start_measuring()
            continue
        row, batch, blocks = command
        tokens = workload.tokens(batch)
        clock.take()
        start = time.process_time()
        measured = trainers[row].step(tokens, blocks)
        measured["cpu_seconds"] = time.process_time() - start
        measured["planning_seconds"] = clock.take()
        if len(trainers) == 1:  # else the peak is of all rows together
            measured["peak_bytes"] = peak_memory_bytes()
        connection.send(measured)
