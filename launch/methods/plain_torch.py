"""Training without DeepSpeed, for methods whose packages know a model and a torch optimizer: one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules
from torch import nn

from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError
from ds_agsel.zero.storage import storage_bytes

from .base import Method, RunContext, without_section
from .tensors import held_by

_ADAM = {"lr", "betas", "eps", "weight_decay"}
_PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TorchEngine:
    """A model and a torch optimizer behind those names of DeepSpeed's engine that a job uses.

    Batch, accumulation, clipping and the scheduler are the ds_config's; DeepSpeed's own scheduler classes are used.
    ``updates`` is asked at each step, once its gradients are clipped, whether they are applied.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> None:
        self.module, self.optimizer = module, optimizer
        self.device = torch.device(get_accelerator().current_device_name())
        self.monitor = SimpleNamespace(enabled=False)
        self.global_rank = self.global_samples = 0
        read = DsConfig.of(config)
        self._accumulation = read.accumulation_steps or 1
        self._clipping = read.gradient_clipping
        self._micro_steps = 0
        self._norm: float | None = None
        self.updates: Callable[[], bool] = lambda: True
        kind = read.scheduler_type
        self._scheduler = getattr(lr_schedules, kind)(optimizer, **read.scheduler_params) if kind else None

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return
        limit = self._clipping or float("inf")
        self._norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        updates = self.updates()
        if updates:
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)
        if updates and self._scheduler:
            self._scheduler.step()

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        return self._norm

    def zero_optimization_partition_weights(self) -> bool:
        return False

    def torch_autocast_enabled(self) -> bool:
        return False


class PlainTorch(Method):
    """A method that is a torch optimizer: `optimizer` makes it."""

    RESUMES: ClassVar[bool] = False
    MASTERS: ClassVar[str] = "no fp32 copies of weights"  # what precision says of a bf16 run

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return without_section(config)

    def start(self, model: nn.Module, context: RunContext) -> TorchEngine:
        if dist.get_world_size() > 1:
            raise ConfigError(f"--method {self.name} is plain PyTorch on one process. Use --num_accelerators 1.")
        model.to(get_accelerator().current_device_name())
        cast_parameters(model, _PRECISIONS[DsConfig.of(context.config).arithmetic])
        self.engine = TorchEngine(model, self.optimizer(model, context), context.config)
        return self.engine

    def optimizer(self, model: nn.Module, context: RunContext) -> torch.optim.Optimizer:
        """Return the method's optimizer for a model that is on its device and in its precision."""
        raise NotImplementedError

    def gradient_bytes(self) -> int:
        return storage_bytes([p.grad for p in self.engine.module.parameters()])

    def state_bytes(self) -> int:
        return storage_bytes(held_by(self.engine.optimizer.state.values()))

    def precision(self, config: Mapping[str, Any]) -> str:
        computed = DsConfig.of(config).arithmetic
        if computed not in _PRECISIONS:
            raise ConfigError(f"--method {self.name} computes in bf16 or fp32, not {computed}. Change the ds_config.")
        return computed if computed == "fp32" else f"{computed}, {self.MASTERS}"


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters to ``dtype``; buffers stay, as DeepSpeed leaves them: rotary frequencies need fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def adam_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return lr, betas, eps and weight_decay of the ds_config's optimizer, as torch's AdamW takes them."""
    read = DsConfig.of(config)
    kind, given = read.optimizer_type, read.optimizer_params
    unknown = sorted(set(given) - _ADAM)
    if kind != "AdamW" or unknown:
        raise ConfigError(
            f"optimizer={kind!r} with {unknown or 'its params'} is not what this method can be given. "
            f"Use AdamW with {', '.join(sorted(_ADAM))}."
        )
    return {**given, "betas": tuple(given.get("betas", (0.9, 0.999)))}


def projected_groups(model: nn.Module, rank: int, **how: Any) -> list[dict[str, Any]]:
    """Return two param groups: the matrices of attention and MLP, with ``projection`` options, after all others."""
    matrices = {p for name, p in model.named_parameters() if p.dim() == 2 and _in_a_layer(name)}
    if not matrices:
        raise ConfigError("This model has no matrices under attention or MLP modules to project. Use another method.")
    others = [p for p in model.parameters() if p not in matrices]
    return [{"params": others}, {"params": [p for p in model.parameters() if p in matrices], "rank": rank, **how}]


def _in_a_layer(name: str) -> bool:
    return any(part in name for part in ("attn", "attention", "mlp"))


class Masters:
    """fp32 copies of the weights in training and AdamW on them; the weights follow at each step.

    A weight that is fp32 is its own copy.
    """

    def __init__(self, weights: Iterable[nn.Parameter], **adam: Any) -> None:
        self.of = {weight: self._copy(weight) for weight in weights}
        self.optimizer = torch.optim.AdamW(list(self.of.values()), fused=True, **adam)
        self.optimizer.register_step_pre_hook(self._hand_over_gradients)
        self.optimizer.register_step_post_hook(self._write_back)

    def keep_only(self, weights: Iterable[nn.Parameter]) -> None:
        """Drop the copies and Adam's states of all but ``weights``, and make those that are missing."""
        self.of, before = {}, self.of
        for weight in weights:
            self.of[weight] = before.pop(weight) if weight in before else self._copy(weight)
        for master in before.values():
            self.optimizer.state.pop(master, None)
        self.optimizer.param_groups[0]["params"] = list(self.of.values())

    def held_bytes(self) -> int:
        """Return the bytes of the copies."""
        return storage_bytes([master for weight, master in self.of.items() if master is not weight])

    @staticmethod
    def _copy(weight: nn.Parameter) -> nn.Parameter:
        return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())

    def _hand_over_gradients(self, *_: Any) -> None:
        for weight, master in self.of.items():
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def _write_back(self, *_: Any) -> None:
        for weight, master in self.of.items():
            if master is not weight and master.grad is not None:
                weight.copy_(master)
                master.grad = None
