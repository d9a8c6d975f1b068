"""Measure what choosing rows costs, and what it chooses on a small task; print the tables of docs/gast.md.

    python -m launch.pages.gast cost
    python -m launch.pages.gast task

`cost`: engines in one process take steps in turn on the same batch, and the median of the ratios within a round is
given. `task`: a tiny Llama learns a fixed permutation of tokens; of the training rows a share has random targets, and
which these are is known. One processor thread, ZeRO-2, one rank; times are processor time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ds_agsel

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # by the number of pairs
FIFTH = {"policy": "random", "select_percent": 20}
COSTS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {
    "all blocks": ({"policy": "all"}, {"random": "random rows", "sample": "alignment"}),
    "20 % of the blocks": (FIFTH, {"random": "random rows", "sample": "alignment"}),
}
METHODS: Mapping[str, Mapping[str, Any] | None] = {
    "all rows": None,
    "random rows": {"draw": "random"},
    "alignment with the batch": {},
    "alignment with clean rows": {"support": "data"},
    "top-K": {"draw": "top"},
}


# ------------------------------------------------------------------------------- engines


def start() -> None:
    """Start a process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")


def engine_of(
    shape: Mapping[str, int],
    section: Mapping[str, Any],
    rows: int,
    lr: float,
    seed: int,
    bf16: bool = False,
    **more: Any,
) -> Any:
    """Return an engine of a Llama of ``shape`` in fp32, or in bf16."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, use_cache=False))
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": lr}},
        "bf16": {"enabled": bf16},
        "steps_per_print": 1_000_000,
        "adagrad_select": {**section, "seed": seed},
    }
    return ds_agsel.initialize(model=model, config=config, model_parameters=model.parameters(), **more)[0]


def step(engine: Any, batch: Mapping[str, Tensor]) -> float:
    """Take a step; return its seconds of processor time."""
    began = time.process_time()
    engine.backward(engine(**batch).loss)
    engine.step()
    return time.process_time() - began


# ---------------------------------------------------------------------------------- cost


def peak_bytes(engine: Any, batch: Mapping[str, Tensor]) -> int:
    """Return the most memory that a step held beyond what there was when it began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(engine, batch)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def layer_bytes(engine: Any, tokens: int) -> int:
    """Return the bytes of inputs and output gradients of a layer's Linears; what Linears share counts once."""
    linears = [module for module in engine.module.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    shared = {"k_proj", "v_proj", "up_proj"}  # their input is q_proj's, or gate_proj's
    names = {id(module): name.rpartition(".")[2] for name, module in engine.module.named_modules()}
    sides = sum(m.out_features + (0 if names[id(m)] in shared else m.in_features) for m in linears)
    return tokens * sides * linears[0].weight.element_size()


def cost(rounds: int, rows: int, length: int, layers: int, vocabulary: int, bf16: bool) -> Iterator[str]:
    """Yield the lines of the table of costs."""
    shape = {
        "vocab_size": vocabulary, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    step_head = f"step against all rows ({rows} rows of {length} tokens, {rounds} rounds)"
    yield f"| blocks | rows | {step_head} | memory added at the peak, of a layer's X and dY |"
    yield "|---|---|---|---|"
    for name, (section, draws) in COSTS.items():
        engines = {"": engine_of(shape, section, rows, 1e-4, 0, bf16)}
        for draw in draws:
            engines[draw] = engine_of(shape, {**section, "gast": {"draw": draw}}, rows, 1e-4, 0, bf16)
        ratios: dict[str, list[float]] = {draw: [] for draw in draws}
        for number in range(rounds + 2):
            ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(number))
            order = list(engines) if number % 2 else list(reversed(engines))
            seconds = {draw: step(engines[draw], {"input_ids": ids, "labels": ids}) for draw in order}
            if number >= 2:  # the first allocate
                for draw in draws:
                    ratios[draw].append(seconds[draw] / seconds[""])
        peaks = {draw: peak_bytes(engine, {"input_ids": ids, "labels": ids}) for draw, engine in engines.items()}
        whole = layer_bytes(engines[""], rows * length)
        for draw, shown in draws.items():
            added = (peaks[draw] - peaks[""]) / whole
            low, *_, high = statistics.quantiles(ratios[draw], n=4)
            ratio = f"{statistics.median(ratios[draw]):.2f} (quartiles {low:.2f} to {high:.2f})"
            yield f"| {name} | {shown} | {ratio} | {added:+.2f} |"
        for engine in engines.values():
            engine.destroy()
        del engines
        gc.collect()


# ---------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Task:
    """Pairs of a token and its image under a permutation; ``wrong`` of the training rows have random images."""

    wrong: float
    seed: int
    rows: int = 512
    pairs: int = 4
    vocabulary: int = 61

    def data(self, split: int) -> tuple[list[dict[str, Tensor]], set[int]]:
        """Return the rows of a split, and which have random images."""
        image = torch.randperm(self.vocabulary, generator=torch.Generator().manual_seed(self.seed))
        generator = torch.Generator().manual_seed(1000 * self.seed + split)
        wrong = set(torch.randperm(self.rows, generator=generator)[: round(self.wrong * self.rows)].tolist())
        found = []
        for row in range(self.rows):
            tokens = torch.randint(self.vocabulary, (self.pairs,), generator=generator)
            random = torch.randint(self.vocabulary, (self.pairs,), generator=generator)
            ids = torch.stack((tokens, random if row in wrong else image[tokens]), 1).flatten()
            labels = ids.clone()
            labels[::2] = -100
            found.append({"input_ids": ids, "labels": labels})
        return found, wrong


@dataclass(frozen=True)
class Outcome:
    """Held-out loss and accuracy, the share of wrong rows among the taken, processor seconds of a step."""

    loss: float
    accuracy: float
    wrong_share: float
    seconds: float


def run_task(task: Task, gast: Mapping[str, Any] | None, steps: int, rows: int) -> Outcome:
    """Train on ``task`` with every block selected, and test on rows without a wrong one."""
    shape = {
        "vocab_size": task.vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    train, wrong = task.data(0)
    clean = replace(task, wrong=0.0)
    from_data = gast is not None and gast.get("support") == "data"
    more: dict[str, Any] = {"support_data": clean.data(2)[0][:64]} if from_data else {}
    engine = engine_of(shape, {"policy": "all", "gast": gast and dict(gast)}, rows, 3e-3, task.seed, **more)
    generator, seconds, shares = torch.Generator().manual_seed(task.seed), [], []
    for _ in range(steps):
        members = torch.randperm(task.rows, generator=generator)[:rows].tolist()
        seconds.append(step(engine, {key: torch.stack([train[m][key] for m in members]) for key in train[0]}))
        bad = {row for row, member in enumerate(members) if member in wrong}
        of_step = engine.selection.samples.history[-1] if gast is not None else None
        taken = [set(of_step.taken(b)[0]) for b in of_step.blocks] if of_step else [set(range(rows))]
        shares.append(statistics.fmean(len(bad & of_block) / len(of_block) for of_block in taken))
    test = clean.data(1)[0]
    batch = {key: torch.stack([row[key] for row in test]) for key in test[0]}
    engine.eval()
    with torch.no_grad():
        output = engine.module(**batch)
    said, wanted = output.logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
    right = (said == wanted)[wanted != -100].float().mean().item()
    engine.destroy()
    return Outcome(output.loss.item(), right, statistics.fmean(shares), statistics.median(seconds))


def task_table(seeds: int, steps: int, rows: int, wrong_percent: Sequence[float]) -> Iterator[str]:
    """Yield the lines of the table of the task; intervals are of the paired differences from all rows."""
    yield "| wrong rows | learned from | held-out loss | against all rows | accuracy | wrong among taken | step, ms |"
    yield "|---|---|---|---|---|---|---|"
    for wrong in (percent / 100 for percent in wrong_percent):
        plain: list[Outcome] = []
        for name, gast in METHODS.items():
            found = [run_task(Task(wrong, seed), gast, steps, rows) for seed in range(seeds)]
            plain = plain or found
            differences = [one.loss - other.loss for one, other in zip(found, plain)]
            half = T_95[seeds] * statistics.stdev(differences) / math.sqrt(seeds)
            mean = {key: statistics.fmean(vars(outcome)[key] for outcome in found) for key in vars(found[0])}
            against = "–" if gast is None else f"{statistics.fmean(differences):+.3f} ± {half:.3f}"
            yield (
                f"| {wrong:.0%} | {name} | {mean['loss']:.3f} | {against} | {mean['accuracy']:.0%} | "
                f"{mean['wrong_share']:.1%} | {1000 * mean['seconds']:.0f} |"
            )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("cost", "task"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the costs")
    parser.add_argument("--bf16", action="store_true", help="of the costs; default: fp32")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T_95))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--wrong", nargs="+", type=float, default=[0, 10, 30], metavar="PERCENT", help="of rows")
    wanted = parser.parse_args()
    start()
    lines = (
        cost(wanted.rounds, wanted.rows, wanted.length, wanted.layers, wanted.vocabulary, wanted.bf16)
        if wanted.table == "cost"
        else task_table(wanted.seeds, wanted.steps, wanted.rows, wanted.wrong)
    )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
