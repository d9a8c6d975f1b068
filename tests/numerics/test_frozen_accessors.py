"""Accessors of parameters that are frozen before `initialize`, as LoRA's base is: what plain DeepSpeed answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ALL, Case, build, forward_backward, tiny_model

FROZEN = "model.layers.1.mlp.up_proj.weight"
GETTERS = ("full_fp32_param", "full_grad", "full_optimizer_state")
LOCAL_GETTERS = ("local_fp32_param", "local_grad", "local_optimizer_state")


def ask(case: Case) -> tuple[dict[str, Any], bool]:
    """What each getter says of a frozen parameter between backward and step, after all setters were called on it;
    and whether its weight is what it was."""
    from deepspeed import utils

    stage3 = case.stage == 3
    model = tiny_model(case)
    frozen = model.get_parameter(FROZEN).requires_grad_(False)
    engine = build(case, model, model_parameters=[p for p in model.parameters() if p.requires_grad])
    before = frozen.detach().clone() if not stage3 else frozen.ds_tensor.detach().clone()
    forward_backward(engine, case, 0, 0)
    full = torch.ones(getattr(frozen, "ds_shape", frozen.shape))
    kinds = {"full": full} | ({"local": torch.ones(frozen.ds_tensor.numel())} if stage3 else {})
    for kind, value in kinds.items():
        getattr(utils, f"safe_set_{kind}_fp32_param")(frozen, value)
        getattr(utils, f"safe_set_{kind}_optimizer_state")(frozen, value, "exp_avg")
        getattr(utils, f"safe_set_{kind}_grad")(frozen, value)
    answers = {}
    for name in GETTERS + (LOCAL_GETTERS if stage3 else ()):
        key = ("exp_avg",) if name.endswith("state") else ()
        answers[name] = getattr(utils, f"safe_get_{name}")(frozen, *key)
    if stage3:
        answers["device"] = engine.optimizer.get_hp_param_device(frozen)
    after = frozen if not stage3 else frozen.ds_tensor
    same = torch.equal(before, after.detach())
    engine.step()
    engine.destroy()
    return answers, same


@pytest.mark.parametrize("stage", [2, 3])
def test_a_frozen_parameter_answers_as_in_plain_deepspeed(workers, stage):
    case = Case(stage=stage, section=ALL)
    for answers, same in workers(1).run(ask, case) + workers(1).run(ask, case.but(section=None)):
        assert set(answers.values()) == {None}
        assert same
