"""One small training run, described by a `Case`: its model, data, ds_config, DeepSpeed run and reference run."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from plain_engines import initialize_plain
from tiny_models import LENGTH, VOCABULARY, TinyNet, tiny_llama
from torch import Tensor, nn
from workers import NVME

MOSTLY_TWO = [pytest.param(1, marks=pytest.mark.slow), 2]  # ranks; for variants of what both counts are held to

BATCH = 2
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.98), 1e-5, 0.1
STATES = ("masters", "exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Two blocks of six or seven a step. With this seed steps 0, 3 and 4 explore, and 6 and 7, in epoch 2, can't.
SELECT = {"select_percent": 34, "steps_per_epoch": 6, "explore_decay": 0.15, "seed": 2}
ALL = {"policy": "all"}
VISIT = {"step_device": "accelerator"}  # on a CPU: the same moves, within one memory
# Room for the largest block of `tiny_llama` and little more: blocks of a step pass through.
NARROW = {**VISIT, "state_budget_bytes": 12 * 1900}
TOPK = {**SELECT, "policy": "gradient_topk"}
FIRST = {**SELECT, "explore_on": "first_micro_batch"}
MODULE = {**SELECT, "granularity": "module", "select_percent": 15}
# Policies that observe what is updated.
MISA = {"policy": "misa", "granularity": "module", "select_percent": 15, "score": "norm", "select_every": 2}
GRASS = {"policy": "grass", "select_percent": 34, "score": "rms", "probe_steps": 2, "select_every": 2}


@dataclass(frozen=True)
class Case:
    """A run of ``steps`` optimizer steps of a tiny model. ``section`` None is plain DeepSpeed, group by group."""

    model: str = "llama"
    stage: int = 2
    offload: str = "none"
    dtype: str = "fp32"
    accumulation: int = 1
    clip: float = 0.0
    tied: bool = True
    steps: int = 8
    seed: int = 0
    decay_groups: bool = False
    optimizer: str = "AdamW"
    section: Mapping[str, Any] | None = field(default_factory=lambda: SELECT)
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


def case_id(value: Any) -> str | None:
    """A readable test id for a case: what differs from the default, "default" where nothing does."""
    if not isinstance(value, Case):
        return None
    default = vars(Case())
    differing = [
        f"{key}={content}".replace(" ", "").replace("'", "")
        for key, content in vars(value).items()
        if content != default[key]
    ]
    return ",".join(differing) or "default"


def tiny_model(case: Case) -> nn.Module:
    """fp32 weights, equal for equal cases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return tiny_llama(case.tied) if case.model == "llama" else TinyNet(case.model)


def model_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Block name -> parameter names, by docs/design.md's definition, spelt out for the models here."""
    blocks: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "layers":
            block = name.split("layers.")[0] + ".".join(parts[:2])
        else:
            block = {"norm": "final_norm", "head": "head", "lm_head": "head"}.get(parts[0], "embedding")
        blocks.setdefault(block, []).append(name)
    return blocks


def model_units(model: nn.Module) -> dict[str, list[str]]:
    """As `model_blocks`, for granularity "module"."""
    units: dict[str, list[str]] = {}
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in model.named_parameters()}
    for block, names in model_blocks(model).items():
        if "layers." not in block:
            units[block] = names
            continue
        parts: dict[str, list[str]] = {f"{block}.norms": [], f"{block}.vectors": []}
        for name in names:
            if "norm" in name:
                parts[f"{block}.norms"].append(name)
            elif len(shapes[name]) < 2:
                parts[f"{block}.vectors"].append(name)
            else:
                parts[name.removesuffix(".weight")] = [name]
        units |= {unit: members for unit, members in parts.items() if members}
    return units


def is_matrix(unit: str) -> bool:
    """Whether a unit of `model_units` is in the lottery."""
    return "layers." in unit and not unit.endswith((".norms", ".vectors"))


def batch(case: Case, step: int, micro_step: int, rank: int) -> dict[str, Tensor]:
    """Token ids and labels, int64, (BATCH, LENGTH), another for each argument."""
    generator = torch.Generator().manual_seed(1_000_000 * case.seed + 10_000 * step + 100 * micro_step + rank)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def nvme_path() -> str:
    """A folder of this process group: DeepSpeed's own files there have the same names in every run."""
    return os.path.join(NVME, os.environ.get("MASTER_PORT", "here"))


@functools.cache
def nvme_lacks() -> str:
    """Why offload to NVMe can't be tested here; empty where it can."""
    from ds_agsel.ds_config import DsConfig
    from ds_agsel.zero.support import missing_for_nvme

    section = {"offload_optimizer": {"device": "nvme", "nvme_path": nvme_path()}}
    return " ".join(missing_for_nvme(DsConfig.of({"zero_optimization": section})))


def needs_nvme() -> pytest.MarkDecorator:
    """A visible skip, with the reason, where offload to NVMe can't be tested."""
    return pytest.mark.skipif(bool(nvme_lacks()), reason=nvme_lacks())


def where_it_runs(cases: Sequence[Case]) -> list[Any]:
    """``cases`` to be parametrized over; those that need NVMe are skipped where that can't be tested."""
    return [pytest.param(case, marks=needs_nvme()) if case.offload == "nvme" else case for case in cases]


def ds_config(case: Case) -> dict[str, Any]:
    """Small buckets, so that a gradient takes several and the embedding is larger than one."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": case.stage,
            "reduce_bucket_size": 500,
            "offload_optimizer": {"device": case.offload},
            **case.zero,
        },
        "optimizer": {
            "type": case.optimizer,
            "params": {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
        **case.config,
    }
    for name in ("offload_optimizer", "offload_param"):
        section = config["zero_optimization"].get(name, {})
        if section.get("device") == "nvme":
            config["zero_optimization"][name] = {**section, "nvme_path": nvme_path()}
    if case.dtype != "fp32":
        config[case.dtype] = {"enabled": True, **case.config.get(case.dtype, {})}
    if case.section is not None:
        config["adagrad_select"] = dict(case.section)
    return config


def decays(name: str, case: Case) -> bool:
    return not (case.decay_groups and ("norm" in name or "gain" in name))


def param_groups(model: nn.Module, case: Case) -> list[dict[str, Any]]:
    """One group, or with ``decay_groups`` one for what decays and one, at a tenth of it, for norms and gains."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(decays(name, case), []).append(parameter)
    return [
        {"params": groups[decay], "weight_decay": WEIGHT_DECAY if decay else WEIGHT_DECAY / 10}
        for decay in sorted(groups, reverse=True)
    ]


def split_by_block(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``groups`` divided by block, as plain DeepSpeed must be given them for a bit-for-bit comparison."""
    parameters = dict(model.named_parameters())
    split = []
    for group in groups:
        for names in model_blocks(model).values():
            block = {id(parameters[name]) for name in names}
            members = [parameter for parameter in group["params"] if id(parameter) in block]
            if members:
                split.append({**group, "params": members})
    return split


def fp16_allowed() -> contextlib.AbstractContextManager[Any]:
    """Inside, fp16 is trained: DeepSpeed refuses it on most processors, being slow there; torch computes it on all."""
    from deepspeed.accelerator import get_accelerator

    return mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True)


def build(case: Case, model: nn.Module | None = None, **arguments: Any) -> Any:
    """The engine: ds_agsel's, or plain DeepSpeed's over per-block groups where the case has no section."""
    import ds_agsel

    model = tiny_model(case) if model is None else model
    if "optimizer" not in arguments:
        groups = param_groups(model, case)
        arguments["model_parameters"] = groups if case.section is not None else split_by_block(model, groups)
    if case.section is None:
        return initialize_plain(model=model, config=ds_config(case), **arguments)
    return ds_agsel.initialize(model=model, config=ds_config(case), **arguments)[0]


def forward_backward(engine: Any, case: Case, step: int, micro_step: int) -> Tensor:
    """One micro-step up to and including backward; its loss, not read: that would wait for the accelerator."""
    data = batch(case, step, micro_step, torch.distributed.get_rank())
    loss = engine(**{name: tensor.to(engine.device) for name, tensor in data.items()}).loss
    engine.backward(loss)
    return loss.detach()


def run_steps(
    engine: Any,
    case: Case,
    first: int = 0,
    last: int | None = None,
    observe: Callable[[str, Any, int], Any] | None = None,
) -> dict[str, Any]:
    """Train steps ``first`` to ``last``, calling ``observe(event, engine, step)`` at each event and keeping what it
    returns. Events: "start" before the first forward of a step, "backward" after each backward, "step" after it."""
    result: dict[str, Any] = {"losses": [], "norms": [], "lrs": [], "observed": []}

    def event(name: str, step: int) -> None:
        if observe is not None:
            seen = observe(name, engine, step)
            if seen is not None:
                result["observed"].append(seen)

    for step in range(first, case.steps if last is None else last):
        event("start", step)
        for micro_step in range(case.accumulation):
            result["losses"].append(forward_backward(engine, case, step, micro_step))
            event("backward", step)
            engine.step()
        result["norms"].append(float(engine.get_global_grad_norm()))
        result["lrs"].append([group["lr"] for group in engine.optimizer.param_groups])
        event("step", step)
    result["losses"] = [loss.item() for loss in result["losses"]]
    return result


def finish(engine: Any, result: dict[str, Any]) -> dict[str, Any]:
    """``result`` with all that the run left behind; ends the engine."""
    result |= {"weights": weights(engine), "partitions": partitions(engine), "skipped": engine.skipped_steps}
    selection = getattr(engine, "selection", None)
    if selection is not None:
        result |= {
            "history": [(record.step, record.phase, record.blocks) for record in selection.history],
            "counts": selection.update_counts,
            "plan": (selection.plan.step, selection.plan.phase, selection.plan.blocks),
            "blocks": {block.name: list(block.parameter_names) for block in selection.blocks},
        }
    engine.destroy()
    return result


def train(case: Case, observe: Callable[[str, Any, int], Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """A whole run of ``case`` on this rank: losses, norms, lrs, what was observed, and all that it left behind."""
    engine = build(case, **arguments)
    return finish(engine, run_steps(engine, case, observe=observe))


def train_all(cases: Sequence[Case], observe: Callable[[str, Any, int], Any] | None = None) -> list[dict[str, Any]]:
    return [train(case, observe) for case in cases]


def on_host(tensor: Tensor) -> Tensor:
    """A copy that nothing changes."""
    return tensor.detach().to("cpu", copy=True)


def weights(engine: Any) -> dict[str, Tensor]:
    return {name: on_host(whole(parameter)) for name, parameter in engine.module.named_parameters()}


def whole(parameter: Any) -> Tensor:
    """The model weight; with stage 3 put together from all ranks' partitions, which a gathered copy must equal."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, get_allgather_dtype

    swapped_out = parameter.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE  # to NVMe
    if swapped_out:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    local = parameter.ds_tensor.detach().flatten()
    parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, local)
    if swapped_out:
        parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    full = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    # With autocast some paths exchange what it casts in its dtype (partition_parameters.py:57), others do not.
    cast = full.to(get_allgather_dtype(parameter, parameter.ds_tensor)).to(full.dtype)
    is_right = any(torch.equal(parameter.data.nan_to_num(), gathered.nan_to_num()) for gathered in (full, cast))
    if parameter.ds_status is ZeroParamStatus.AVAILABLE and not is_right:
        raise AssertionError(f"{parameter.ds_summary()} is gathered, and not what its partitions are")
    return full


def partitions(engine: Any) -> list[dict[str, Any]]:
    """This rank's raw ZeRO partition of each param group, with the group's parameters in the order they lie in it.

    With stage 3 of each parameter. A group without Adam state answers as one that was never updated: zeros, step 0.
    """
    zero = engine.optimizer
    with zero.home.readable() if hasattr(zero, "home") else contextlib.nullcontext():
        return stage3_partitions(zero) if hasattr(zero, "fp16_groups") else stage12_partitions(zero)


def stage12_partitions(zero: Any) -> list[dict[str, Any]]:
    found = []
    for members, master in zip(zero.round_robin_bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        state = zero.optimizer.state.get(master, {})
        found.append(
            {
                "shapes": {zero.param_names[parameter]: parameter.shape for parameter in members},
                "masters": on_host(master),
                "exp_avg": on_host(state.get("exp_avg", torch.zeros_like(master))),
                "exp_avg_sq": on_host(state.get("exp_avg_sq", torch.zeros_like(master))),
                "step": int(state.get("step", 0)),
            }
        )
    return found


def stage3_partitions(zero: Any) -> list[dict[str, Any]]:
    found = []
    for sub_group, members in enumerate(zero.fp16_groups):
        swapped_out = zero._swappable_optimizer_subgroup(sub_group)  # plain DeepSpeed's, to NVMe
        if swapped_out:
            zero._optimizer_states_and_gradient_swap_in(sub_group)
        master = zero.fp32_partitioned_groups_flat[sub_group]
        state = zero.optimizer.state.get(master, {})
        for parameter in members:
            _, start, numel = zero.grad_position[zero.get_param_id(parameter)]
            # The last rank's part may end in padding, which nobody initialises (partition_parameters.py:1836).
            numel = max(0, min(numel, parameter.ds_numel - numel * torch.distributed.get_rank()))
            held = {"masters": master} | {key: state.get(key, torch.zeros_like(master)) for key in STATES[1:]}
            found.append(
                {"shapes": {zero.param_names[parameter]: parameter.ds_shape}, "step": int(state.get("step", 0))}
                | {kind: on_host(tensor.narrow(0, start, numel)) for kind, tensor in held.items()}
            )
        if swapped_out:
            zero._release_swap_buffers(sub_group)
    return found


def assemble(states: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Masters and moments by parameter name, from what each rank observed at one moment."""
    full: dict[str, dict[str, Tensor]] = {"weights": states[0]["weights"]} | {kind: {} for kind in STATES}
    for pieces in zip(*(state["partitions"] for state in states), strict=True):
        for kind in STATES:
            flat = torch.cat([piece[kind] for piece in pieces])
            start = 0
            for name, shape in pieces[0]["shapes"].items():
                full[kind][name] = flat[start : start + shape.numel()].view(shape)
                start += shape.numel()
    return full


def observe_state(event: str, engine: Any, step: int) -> dict[str, Any] | None:
    """Before the first step and after every step: weights, raw partitions, counts and plan."""
    if event != "step" and (event, step) != ("start", 0):
        return None
    selection = engine.selection
    return {
        "weights": weights(engine),
        "partitions": partitions(engine),
        "counts": selection.update_counts,
        "plan": (selection.plan.step, selection.plan.phase, selection.plan.blocks),
    }


def differences(expected: Any, actual: Any, path: str = "") -> list[str]:
    """Where two nests of dicts, sequences, tensors and values are not equal bit for bit."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if expected.dtype != actual.dtype or expected.shape != actual.shape:
            return [f"{path}: {expected.dtype} {expected.shape} != {actual.dtype} {actual.shape}"]
        if not torch.equal(expected, actual):
            return [f"{path}: {(expected != actual).sum()} of {expected.numel()} elements differ"]
        return []
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if expected.keys() != actual.keys():
            return [f"{path}: keys {sorted(expected)} != {sorted(actual)}"]
        return [d for key in expected for d in differences(expected[key], actual[key], f"{path}/{key}")]
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        if len(expected) != len(actual):
            return [f"{path}: {len(expected)} items != {len(actual)}"]
        return [
            d for i, pair in enumerate(zip(expected, actual, strict=True)) for d in differences(*pair, f"{path}/{i}")
        ]
    return [] if expected == actual else [f"{path}: {expected!r} != {actual!r}"]


def assert_identical(expected: Any, actual: Any) -> None:
    """Equal bit for bit; names the first places that are not."""
    found = differences(expected, actual)
    if found:
        raise AssertionError(f"{len(found)} differences:\n" + "\n".join(found[:20]))


def relative_error(expected: Tensor, actual: Tensor, start: Tensor) -> float:
    """‖actual - expected‖₂ / ‖expected - start‖₂; 0 where there is no difference."""
    error = (actual.double() - expected.double()).norm().item()
    moved = (expected.double() - start.double()).norm().item()
    return 0.0 if error == 0 else error / moved if moved else math.inf
