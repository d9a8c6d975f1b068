"""DeepSpeed's safe_get_full_* and safe_set_full_* work for every block at every step, on every rank."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from support import (
    SELECT,
    VISIT,
    Case,
    assemble,
    assert_identical,
    build,
    case_id,
    forward_backward,
    observe_state,
    partitions,
    run_steps,
    train,
    weights,
    where_it_runs,
)

from ds_agsel.errors import TrainingError

CASES = [
    *(Case(stage=stage, offload=offload, steps=4) for stage, offload in product((1, 2), ("none", "cpu"))),
    Case(dtype="bf16", steps=4),
    Case(dtype="bf16", offload="cpu", steps=4, decay_groups=True),
    Case(model="net", steps=4, decay_groups=True),
    Case(model="net", steps=4, decay_groups=True, offload="cpu"),
    Case(stage=3, dtype="bf16", steps=4),
    Case(stage=3, offload="cpu", steps=4, zero={"sub_group_size": 300}),
    Case(stage=3, model="net", steps=4, decay_groups=True, zero={"stage3_param_persistence_threshold": 0}),
    Case(stage=3, model="net", steps=4, decay_groups=True, offload="cpu"),
    Case(stage=3, steps=4, section={**SELECT, **VISIT}, zero={"sub_group_size": 300}),
    Case(stage=3, model="net", steps=4, decay_groups=True, offload="nvme"),
]
ROBIN = [
    Case(stage=stage, offload=offload, steps=2, zero={"round_robin_gradients": True})
    for stage, offload in product((1, 2), ("none", "cpu"))
]


def get_all(event: str, engine: Any, step: int) -> dict[str, Any] | None:
    """Everything the getters say before the first step, between backward and step, and after each step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    if event == "start" and step > 0:
        return None
    parameters = dict(engine.module.named_parameters())
    seen: dict[str, Any] = {
        "masters": {name: safe_get_full_fp32_param(p).clone() for name, p in parameters.items()},
        "exp_avg": {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in parameters.items()},
        "exp_avg_sq": {name: safe_get_full_optimizer_state(p, "exp_avg_sq").clone() for name, p in parameters.items()},
    }
    if event == "backward":
        gradients = {name: safe_get_full_grad(p) for name, p in parameters.items()}
        return {"gradients": {name: None if g is None else g.float().clone() for name, g in gradients.items()}} | seen
    return {"expected": observe_state(event, engine, step)} | seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", where_it_runs([*CASES, *ROBIN]), ids=case_id)
def test_getters_tell_what_the_partitions_hold(workers, case, ranks):
    runs = workers(ranks).run(train, case, get_all)
    for moments in zip(*(run["observed"] for run in runs), strict=True):
        if "expected" in moments[0]:
            expected = assemble([moment["expected"] for moment in moments])
            del expected["weights"]
        for moment in moments:
            assert_identical(expected, {kind: moment[kind] for kind in expected})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", where_it_runs(CASES), ids=case_id)
def test_gradient_getter_tells_the_mean_gradient_or_none(workers, case, ranks):
    """At an exploit step an unselected block's gradient was never computed: None. A selected one's makes the norm.

    At an explore step that streams it is there for selected blocks too; what others have beaten has been given back.
    """
    streams = case.stage > 1 and case.accumulation == 1
    for run in workers(ranks).run(train, case, get_all):
        gradients = [moment["gradients"] for moment in run["observed"] if "gradients" in moment]
        for (_, phase, selected), norm, by_name in zip(run["history"], run["norms"], gradients, strict=True):
            squared = 0.0
            for index, names in enumerate(run["blocks"].values()):
                is_there = {by_name[name] is not None for name in names}
                if index not in selected and (phase == "exploit" or streams):
                    assert is_there == {False}
                    continue
                assert is_there == {True}
                block = sum(by_name[name].double().pow(2).sum().item() for name in names)
                assert block > 0
                squared += block if index in selected else 0.0
            assert squared**0.5 == pytest.approx(norm, rel=1e-5 if case.dtype == "fp32" else 2e-2)


def set_all(case: Case) -> dict[str, Any]:
    """What the getters say after the setters set every parameter before the first step, and a step after that."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

    engine = build(case)
    parameters = dict(engine.module.named_parameters())
    wanted: dict[str, Any] = {"masters": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for index, (name, parameter) in enumerate(parameters.items()):
        for kind, offset in (("masters", 0.25), ("exp_avg", 0.5), ("exp_avg_sq", 0.75)):
            wanted[kind][name] = torch.full(shape_of(parameter), index + offset)
        safe_set_full_fp32_param(parameter, wanted["masters"][name])
        safe_set_full_optimizer_state(parameter, wanted["exp_avg"][name], "exp_avg")
        safe_set_full_optimizer_state(parameter, wanted["exp_avg_sq"][name], "exp_avg_sq")
    found = {
        "masters": {name: safe_get_full_fp32_param(p).clone() for name, p in parameters.items()},
        "exp_avg": {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in parameters.items()},
        "exp_avg_sq": {name: safe_get_full_optimizer_state(p, "exp_avg_sq").clone() for name, p in parameters.items()},
    }
    forward_backward(engine, case, 0, 0)
    chosen = {
        name for index in engine.selection.selected_blocks for name in engine.selection.blocks[index].parameter_names
    }
    refused = set()
    for name, parameter in parameters.items():
        try:
            safe_set_full_grad(parameter, torch.zeros(shape_of(parameter)))
        except TrainingError as error:
            assert "step 0: a gradient of block" in str(error) and "safe_get_full_grad" in str(error)
            refused.add(name)
    assert refused == parameters.keys() - chosen
    engine.step()
    after = {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in parameters.items()}
    (record,) = engine.selection.history
    selected = [name for index in record.blocks for name in engine.selection.blocks[index].parameter_names]
    engine.destroy()
    return {"wanted": wanted, "found": found, "after": after, "selected": selected}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", where_it_runs(CASES), ids=case_id)
def test_setters_reach_every_block_and_the_step_uses_what_was_set(workers, case, ranks):
    case = case.but(section={"policy": "fixed", "fixed_blocks": list(BLOCKS[case.model])})
    for result in workers(ranks).run(set_all, case):
        assert_identical(result["wanted"], result["found"])
        for name, exp_avg in result["wanted"]["exp_avg"].items():
            expected = 0.9 * exp_avg if name in result["selected"] else exp_avg
            assert torch.allclose(result["after"][name], expected, rtol=1e-6, atol=0), name


def shape_of(parameter: Any) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


BLOCKS = {"llama": ("embedding", "model.layers.2"), "net": ("embedding", "layers.2")}


def save_nothing_lost(case: Case) -> dict[str, Any]:
    """Setters in mid-run: the next steps go on from what was set."""
    from deepspeed.utils import safe_set_full_fp32_param

    engine = build(case)
    run_steps(engine, case, 0, 2)
    for parameter in engine.module.parameters():
        safe_set_full_fp32_param(parameter, torch.full(shape_of(parameter), 0.125))
    before = weights(engine)
    run_steps(engine, case, 2, 3)
    after = weights(engine)
    selected = engine.selection.history[-1].blocks
    blocks = [block.parameter_names for block in engine.selection.blocks]
    engine.destroy()
    return {"before": before, "after": after, "selected": selected, "blocks": blocks}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_set_in_mid_run_are_where_training_goes_on(workers, stage, ranks):
    for result in workers(ranks).run(save_nothing_lost, Case(stage=stage)):
        for index, names in enumerate(result["blocks"]):
            for name in names:
                assert (result["before"][name] == 0.125).all()
                moved = (result["after"][name] - 0.125).abs().max()
                assert moved <= 0.05 if index in result["selected"] else moved == 0


def get_and_set_locally(case: Case) -> dict[str, Any]:
    """ZeRO-3's accessors of this rank's partitions, frozen or not: what they say beside the raw partitions, before
    and after each moment of every parameter was set to its number; and what the vectorized setter of gradients did."""
    from deepspeed.utils import (
        safe_get_full_grad,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
        safe_update_full_grad_vectorized,
    )

    def get() -> list[dict[str, torch.Tensor]]:
        """Each parameter's part of this rank, without the padding that ends it on the last rank."""
        found = []
        for parameter in parameters:
            numel = parameter.ds_tensor.numel()
            numel = max(0, min(numel, parameter.ds_numel - numel * torch.distributed.get_rank()))
            held = {"masters": safe_get_local_fp32_param(parameter)}
            held |= {key: safe_get_local_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            found.append({key: tensor.flatten()[:numel].clone() for key, tensor in held.items()})
        return found

    def raw() -> list[dict[str, torch.Tensor]]:
        of_name = {next(iter(part["shapes"])): part for part in partitions(engine)}
        return [{key: of_name[names[p]][key] for key in ("masters", "exp_avg", "exp_avg_sq")} for p in parameters]

    engine = build(case)
    parameters, names = list(engine.module.parameters()), engine.optimizer.param_names
    run_steps(engine, case, 0, 3)
    forward_backward(engine, case, 3, 0)
    result = {"before": (get(), raw())}
    with_gradient = [p for p in parameters if safe_get_full_grad(p) is not None]
    gradients = [safe_get_full_grad(p) for p in with_gradient]
    safe_update_full_grad_vectorized(parameters, lambda gradient, _: gradient * 0.5)
    result["gradients"] = ([g * 0.5 for g in gradients], [safe_get_full_grad(p) for p in with_gradient])
    local = [safe_get_local_grad(p) for p in parameters]
    result["locally"] = [
        (g is None) == (p not in set(with_gradient)) and (g is None or g.numel() == p.ds_tensor.numel())
        for p, g in zip(parameters, local, strict=True)
    ]
    for number, parameter in enumerate(parameters):
        value = torch.full((parameter.ds_tensor.numel(),), number + 0.25)
        safe_set_local_fp32_param(parameter, value)
        safe_set_local_optimizer_state(parameter, value, "exp_avg")
        safe_set_local_optimizer_state(parameter, value, "exp_avg_sq")
    result["after"] = (get(), raw())
    engine.destroy()
    return result


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", where_it_runs([case for case in CASES if case.stage == 3]), ids=case_id)
def test_local_accessors_tell_and_set_the_partitions(workers, case, ranks):
    for result in workers(ranks).run(get_and_set_locally, case):
        assert_identical(*result["before"])
        assert_identical(*result["gradients"])
        assert all(result["locally"])
        assert_identical(*result["after"])
        for number, part in enumerate(result["after"][0]):
            assert all((tensor == number + 0.25).all() for tensor in part.values())
