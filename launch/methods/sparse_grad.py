"""SparseGrad as in its paper (arXiv:2410.07383), in plain PyTorch: layers of three products, entries chosen every step.

[Note: Three products] With P and Q the singular bases of the gradients, the weight W of a Linear is kept as P'WQ, in
which gradients are concentrated, and forward multiplies by P (P'WQ) Q'. The gradient of the rotated weight is dense;
its largest entries are what Adam sees, others at each step, in the form of torch's SparseAdam: the moments of an entry
change in the steps in which it is chosen. The matrices of MLPs are trained, without gates, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ds_agsel.errors import ConfigError
from ds_agsel.sparse.basis import Energy, choose
from ds_agsel.sparse.staircase import num_entries
from ds_agsel.sparse.targets import Target, find_targets
from ds_agsel.sparse_grad_section import SparseGradConfig
from ds_agsel.zero.storage import storage_bytes

from .base import Option, RunContext
from .plain_torch import PlainTorch, TorchEngine, adam_options


class ThreeProducts:
    """The ``forward`` of a Linear whose weight is rotated: P (weight) Q' x + bias. [Note: Three products].

    Args:
        left, right: P (D_out, D_out) and Q (D_in, D_in), fp32, orthogonal.
    """

    def __init__(self, module: nn.Linear, left: Tensor, right: Tensor) -> None:
        self._module, self._exact = module, (left, right)
        weight = module.weight
        self._left, self._right = left.to(weight.dtype), right.T.to(weight.dtype).contiguous()
        weight.data = (left.T @ weight.data.float() @ right).to(weight.dtype)
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, input: Tensor) -> Tensor:  # torch's name: it may be given as a keyword
        """Return the Linear's output, (..., D_out)."""
        linear = nn.functional.linear
        return linear(linear(linear(input, self._right), self._module.weight), self._left, self._module.bias)

    def undo(self) -> None:
        """Give the module its plain weight and forward."""
        left, right = self._exact
        weight = self._module.weight
        weight.data = (left @ weight.data.float() @ right.T).to(weight.dtype)
        self._module.forward = MethodType(nn.Linear.forward, self._module)  # type: ignore[method-assign]


class LargestEntriesAdam(torch.optim.Optimizer):
    """Adam on the largest entries of each gradient, chosen at each step, as torch's SparseAdam does it.

    A weight that is not fp32 has an fp32 copy in ``state[weight]["master"]``.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], entries_percent: float, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps})
        self._percent = entries_percent
        self.entries: dict[nn.Parameter, Tensor] = {}  # chosen by the last step, in the flattened weight

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, weight.grad.flatten(), group)

    def _step(self, weight: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state.update(step=0, exp_avg=_zeros(weight), exp_avg_sq=_zeros(weight))
            if weight.dtype != torch.float32:
                state["master"] = weight.detach().float().flatten()
        state["step"] += 1
        chosen = gradient.abs().topk(num_entries(self._percent, gradient.numel())).indices
        self.entries[weight] = chosen
        values = gradient[chosen].float()
        first = torch.lerp(state["exp_avg"][chosen], values, 1 - beta1)
        second = torch.lerp(state["exp_avg_sq"][chosen], values.square(), 1 - beta2)
        state["exp_avg"][chosen], state["exp_avg_sq"][chosen] = first, second
        corrections = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        size = group["lr"] * corrections[1] ** 0.5 / corrections[0]
        values = state.get("master", weight.detach().view(-1))
        values[chosen] -= size * first / (second.sqrt() + group["eps"])
        if "master" in state:
            weight.view(-1)[chosen] = values[chosen].to(weight.dtype)


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)


class SparseGrad(PlainTorch):
    """The paper's layers. The first ``calibration_steps`` steps give the bases, one pair a kind, and change nothing."""

    OPTIONS: ClassVar[Mapping[str, Option]] = {"entries_percent": 1.0, "calibration_steps": 10}
    MASTERS: ClassVar[str] = "fp32 copies of the weights in training"

    def start(self, model: nn.Module, context: RunContext) -> TorchEngine:
        self._check_options()
        engine = super().start(model, context)
        engine.updates = self._updates
        return engine

    def _check_options(self) -> None:
        percent, steps = self.options["entries_percent"], self.options["calibration_steps"]
        if not 0 < percent <= 100:
            raise ConfigError(f"--method-option entries_percent={percent} is outside (0, 100]. Use 1.")
        if steps < 1:
            raise ConfigError(f"--method-option calibration_steps={steps} is outside [1, inf). Use 10.")

    def optimizer(self, model: nn.Module, context: RunContext) -> torch.optim.Optimizer:
        section = SparseGradConfig.model_validate({"entries_percent": self.options["entries_percent"]})
        targets = [target for target in find_targets(model, section) if "gate" not in target.name.split(".")[-2]]
        others = [target.name for target in targets if not isinstance(target.module, nn.Linear)]
        if others:
            raise ConfigError(f"--method {self.name} rotates Linears, and {others[0]} is none. Use another model.")
        self._targets: list[Target] = targets
        self._layers: list[ThreeProducts] = []
        self._energy: dict[str, Energy] = {}
        self._gathered = 0
        self._was_calibration = True
        names = {target.name for target in targets}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        adam = adam_options(context.config)
        return LargestEntriesAdam(
            [target.weight for target in targets], self.options["entries_percent"], adam["lr"],
            adam["betas"], adam.get("eps", 1e-8),
        )  # fmt: skip

    def _updates(self) -> bool:
        """Return whether the step that ends now changes weights; gather the energy of its gradients if not."""
        self._was_calibration = self._gathered < self.options["calibration_steps"]
        if self._was_calibration:
            for target in self._targets:
                self._gather(target)
            self._gathered += 1
            if self._gathered == self.options["calibration_steps"]:
                self._rotate()
        return not self._was_calibration

    def _gather(self, target: Target) -> None:
        gradient = target.weight.grad
        if gradient is None:
            return
        if target.kind not in self._energy:
            self._energy[target.kind] = target.new_energy("both", gradient.device)
        self._energy[target.kind].add(gradient if target.lines_are_rows else gradient.T)

    def _rotate(self) -> None:
        for kind, energy in self._energy.items():
            of_kind = [target for target in self._targets if target.kind == kind]
            basis = choose(energy, of_kind[0].weight.numel(), torch.float32)  # all entries: whole bases
            if basis.lines is None:
                raise ValueError("the energy of both sides gives both bases")
            for target in of_kind:
                lines, directions = (side.to(target.weight.device) for side in (basis.lines, basis.directions))
                left, right = (lines, directions) if target.lines_are_rows else (directions, lines)
                module: Any = target.module
                self._layers.append(ThreeProducts(module, left, right))
        self._energy.clear()

    def phase(self) -> str:
        return "skipped" if self._was_calibration else "plain"

    def trained(self) -> frozenset[str]:
        return frozenset(target.name for target in self._targets)

    def state_bytes(self) -> int:
        return super().state_bytes() - self.master_bytes()

    def master_bytes(self) -> int:
        return storage_bytes([state["master"] for state in self.engine.optimizer.state.values() if "master" in state])

    def result(self) -> tuple[Any, Mapping[str, Tensor] | None]:
        for layer in self._layers:
            layer.undo()
        self._layers.clear()
        return super().result()
