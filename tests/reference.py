"""AdaGradSelect on AdamW step by step in plain PyTorch: the slow twin that ds_agsel is compared with.

Nothing here knows DeepSpeed, ZeRO, partitions or buffers. Ranks are a loop. Every step goes through the numbered
paragraphs of "A step" in docs/design.md, in their order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Chooser(Protocol):
    """What decides: ds_agsel's policies, or a few lines in a test. Indices are those of the drawn blocks."""

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None: ...

    def choose(self, step: int, scores: Sequence[float]) -> tuple[int, ...]: ...

    def selects_nothing(self, step: int) -> bool: ...

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None: ...


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum, added up from the first on."""
    return functools.reduce(torch.add, tensors)


@dataclass(frozen=True)
class AdamW:
    """Hyperparameters. ``decoupled`` False is Adam, whose weight decay is added to the gradient."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: Callable[[str], float]
    decoupled: bool = True
    schedule: Callable[[int], float] = lambda applied_steps: 1.0


@dataclass(frozen=True)
class Applied:
    """One applied step: what ds_agsel records, and what the choice came from."""

    step: int
    phase: str
    blocks: tuple[int, ...]
    scores: tuple[float, ...]
    norm: float


class Reference:
    """Trains ``model`` on the CPU.

    Args:
        model: its weights' dtype is the one that forward uses; masters and states are fp32.
        blocks: each block's parameter names, in block order; together all trainable parameters, each once.
        chooser: decides over the blocks that are in neither ``always`` nor ``never`` (block indices).
        max_norm: clips the norm of the gradients that are applied; 0 does not clip.
        reduces_each_micro_step: as ZeRO-2 does; else a rank adds up first, in its weights' dtype, as ZeRO-1 does.
        on_reentry: what a block's moments are after steps that did not update it: "keep", "reset" or "decay".
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Sequence[str]],
        chooser: Chooser,
        adam: AdamW,
        max_norm: float = 0.0,
        always: Sequence[int] = (),
        never: Sequence[int] = (),
        reduces_each_micro_step: bool = True,
        explores_on_first_micro_batch: bool = False,
        score: str = "sum",
        select_every: int = 1,
        on_reentry: str = "keep",
    ):
        self.model = model
        self.blocks = blocks
        self.chooser = chooser
        self.adam = adam
        self.max_norm = max_norm
        self.reduces_each_micro_step = reduces_each_micro_step
        self.explores_on_first_micro_batch = explores_on_first_micro_batch
        self.score = score
        self.select_every = select_every
        self.held: tuple[int, tuple[int, ...]] | None = None  # first step of the round, and its drawn blocks
        self.on_reentry = on_reentry
        self.always = tuple(always)
        self.drawn = [index for index in range(len(blocks)) if index not in (*always, *never)]
        self.parameters = dict(model.named_parameters())
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.exp_avg = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.update_counts = [0] * len(blocks)
        self.moment_counts = [0] * len(blocks)  # updates that the moments remember: Adam's step counts
        self.last_updates = [0] * len(blocks)
        self.history: list[Applied] = []
        self.losses: list[list[float]] = []

    def step(self, batches: Sequence[Sequence[Batch]]) -> Applied | None:
        """One optimizer step on ``batches[rank][micro_step]``; None where it is skipped, which changes nothing."""
        step = len(self.history)

        # 1. Plan, at the first step of a round.
        drawn = self.planned(step)
        phase = "explore" if drawn is None else "exploit"

        # 2., 3. Gradients. All are computed here, whatever was planned: what is not selected must not matter.
        gradients = self.mean_gradients(batches)

        # 4. Scores, and the choice where the plan has left it open.
        scored = self.first_gradients if self.explores_on_first_micro_batch else gradients
        scores = tuple(self.block_score([scored[name] for name in names]) for names in self.blocks)
        if drawn is None:
            if not all(math.isfinite(score) for score in scores):
                return None
            if self.chooser.selects_nothing(step):
                drawn = ()
            else:
                drawn = self.chooser.choose(step, [scores[index] for index in self.drawn])
        selected = tuple(sorted([*(self.drawn[index] for index in drawn), *self.always]))

        # 5. Clip by the norm of what is applied, update, write the model weights back.
        applied = {name: gradients[name] for index in selected for name in self.blocks[index]}
        norm = math.sqrt(sum(gradient.double().pow(2).sum().item() for gradient in applied.values()))
        if not math.isfinite(norm):
            return None
        if self.max_norm > 0:
            coefficient = min(1.0, self.max_norm / (norm + 1e-6))
            applied = {name: gradient * coefficient for name, gradient in applied.items()}
        lr = self.adam.lr * self.adam.schedule(step)
        self.forget_all_but(selected)
        for index in selected:
            if self.on_reentry == "decay" and self.update_counts[index]:
                self.decay(index, step - self.last_updates[index] - 1)
            self.update_counts[index] += 1
            self.moment_counts[index] += 1
            self.last_updates[index] = step
            for name in self.blocks[index]:
                self.update_parameter(name, applied[name], self.moment_counts[index], lr)

        # 6. Commit. The round begins, if it has not. The chooser sees the scores of what it chose, or of all.
        if drawn:
            self.held = self.held or (step, drawn)
        seen = tuple(drawn) if phase == "exploit" else tuple(range(len(self.drawn)))
        self.chooser.observe(step, seen, [scores[self.drawn[place]] for place in seen])
        record = Applied(step, phase, selected, scores, norm)
        self.history.append(record)
        ahead = self.planned(step + 1) if self.on_reentry == "reset" else None
        if ahead is not None:
            self.forget_all_but([*(self.drawn[index] for index in ahead), *self.always])
        return record

    def planned(self, step: int) -> tuple[int, ...] | None:
        """The drawn blocks of the round that ``step`` is in, or of a new one; None where it explores."""
        if self.held is not None and step >= self.held[0] + self.select_every:
            self.held = None
        if self.held is not None:
            return self.held[1]
        return self.chooser.plan(step, [self.update_counts[index] for index in self.drawn])

    def block_score(self, gradients: Sequence[Tensor]) -> float:
        """The size of a block's gradient, as ``score`` measures it."""
        if self.score == "sum":
            return sum(gradient.norm().item() for gradient in gradients)
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        return (whole.norm() if self.score == "norm" else whole.square().mean().sqrt()).item()

    def forget_all_but(self, kept: Iterable[int]) -> None:
        """With "reset": moments of blocks that are known not to be updated next are zeros after 0 updates."""
        if self.on_reentry == "reset":
            for index in set(range(len(self.blocks))) - set(kept):
                self.decay(index, math.inf)
                self.moment_counts[index] = 0

    def decay(self, index: int, missed: float) -> None:
        """Scale a block's moments by the βs to the power of the ``missed`` steps."""
        for moments, beta in zip((self.exp_avg, self.exp_avg_sq), self.adam.betas, strict=True):
            for name in self.blocks[index]:
                moments[name] = moments[name] * beta**missed

    def mean_gradients(self, batches: Sequence[Sequence[Batch]]) -> dict[str, Tensor]:
        """fp32 gradient of every parameter, averaged over all ranks' micro-batches.

        Added up in fp32 and rounded to the weights' dtype where ZeRO rounds: a micro-batch's share of the mean, and
        what the ranks exchange, which is each micro-step's mean or once the mean of their sums.
        """
        weights = self.parameters.items()
        shares = [self.micro_gradients(micro_batches) for micro_batches in batches]
        if self.reduces_each_micro_step:
            means = [self.mean_over_ranks(gradients) for gradients in zip(*shares, strict=True)]
            self.first_gradients = {name: gradient.float() for name, gradient in means[0].items()}
            return {name: total(mean[name].float() for mean in means) for name in self.parameters}
        sums = [
            {name: total(share[name].float() for share in of_rank).to(weight.dtype) for name, weight in weights}
            for of_rank in shares
        ]
        return {name: mean.float() for name, mean in self.mean_over_ranks(sums).items()}

    def micro_gradients(self, micro_batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """One rank's gradients of each micro-batch's share of its mean loss, in the weights' dtype."""
        gradients, losses = [], []
        for batch in micro_batches:
            loss = self.model(**batch).loss
            share = loss / len(micro_batches)  # first: in bf16 a third of the gradient is not that of a third
            found = torch.autograd.grad(share, list(self.parameters.values()))
            gradients.append(dict(zip(self.parameters, found, strict=True)))
            losses.append(loss.item())
        self.losses.append(losses)
        return gradients

    def mean_over_ranks(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """In the gradients' dtype."""
        return {name: total(each[name] / len(gradients) for each in gradients) for name in self.parameters}

    @torch.no_grad()
    def update_parameter(self, name: str, gradient: Tensor, count: int, lr: float) -> None:
        """AdamW as in torch.optim, with the count of this parameter's own block in the bias corrections."""
        adam, master = self.adam, self.masters[name]
        beta1, beta2 = adam.betas
        decay = adam.weight_decay(name)
        if adam.decoupled:
            master *= 1 - lr * decay
        else:
            gradient = gradient + decay * master
        self.exp_avg[name] = beta1 * self.exp_avg[name] + (1 - beta1) * gradient
        self.exp_avg_sq[name] = beta2 * self.exp_avg_sq[name] + (1 - beta2) * gradient**2
        mean = self.exp_avg[name] / (1 - beta1**count)
        variance = self.exp_avg_sq[name] / (1 - beta2**count)
        master -= lr * mean / (variance.sqrt() + adam.eps)
        self.parameters[name].copy_(master)
