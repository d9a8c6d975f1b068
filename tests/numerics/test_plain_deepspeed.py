"""With every block selected the bits are plain DeepSpeed's; switched off, everything is DeepSpeed's own."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from plain_engines import LOST, initialize_plain, loses_gradients, mend_plain_0189
from support import (
    ALL,
    LEARNING_RATE,
    MOSTLY_TWO,
    NARROW,
    VISIT,
    Case,
    assert_identical,
    build,
    case_id,
    ds_config,
    finish,
    relative_error,
    run_steps,
    tiny_model,
    train_all,
)

HUNDRED = {"select_percent": 100, "steps_per_epoch": 6, "explore_decay": 0.15, "seed": 2}
SAME = ("losses", "norms", "lrs", "weights", "partitions", "skipped")

WIDE = [
    Case(stage=stage, offload=offload, dtype=dtype, clip=clip, accumulation=accumulation, steps=4, section=ALL)
    for stage, offload, dtype, clip, accumulation in product(
        (1, 2, 3), ("none", "cpu"), ("fp32", "bf16"), (0.0, 0.3), (1, 3)
    )
]
# Half of them, and of stage 3 a quarter, in which each setting meets each other one; the rest is slow.
CORE = [
    case
    for case in WIDE
    if (case.stage == 2) ^ (case.dtype == "bf16") ^ (case.clip > 0) ^ (case.accumulation > 1)
    and (case.stage != 3 or (case.offload == "cpu") ^ (case.clip > 0))
]
SWEEP = [pytest.param(case, marks=[] if case in CORE else pytest.mark.slow, id=case_id(case)) for case in WIDE]

FLAGS = ("overlap_comm", "contiguous_gradients", "round_robin_gradients")
VARIANTS = [
    *(Case(steps=4, section={**ALL, **visit}, dtype=dtype, clip=0.3, decay_groups=True)
      for visit, dtype in ((VISIT, "bf16"), (NARROW, "fp32"))),
    Case(stage=3, steps=4, section={**ALL, **NARROW}, dtype="bf16", clip=0.3, zero={"sub_group_size": 300}),
    *(
        Case(
            stage=stage, offload=offload, steps=3, section=HUNDRED, accumulation=2,
            dtype=("bf16", "fp32")[stage % 2],
            zero=dict(zip(FLAGS, flags, strict=True)),
        )
        for stage, offload, *flags in product((1, 2), ("none", "cpu"), (False, True), (False, True), (False, True))
        if (stage == 1) ^ (offload == "cpu") ^ (sum(flags) % 2 == 1)
    ),
    *(Case(offload=offload, steps=4, section=ALL, decay_groups=True, clip=0.3, tied=False)
      for offload in ("none", "cpu")),
    *(Case(offload=offload, steps=4, section=HUNDRED, model="net", decay_groups=True) for offload in ("none", "cpu")),
    *(
        Case(stage=stage, offload=offload, steps=4, section=ALL, dtype="bf16", accumulation=3,
             config={"data_types": {"grad_accum_dtype": "fp32"}})
        for stage, offload in ((2, "none"), (2, "cpu"), (1, "cpu"))
    ),
    # A reduction that rounds: on one rank, too, it is not left out.
    *(Case(stage=stage, steps=3, section=ALL, config={"communication_data_type": "bf16"}) for stage in (2, 3)),
    Case(steps=4, section=ALL, optimizer="Adam", offload="cpu"),
    Case(steps=5, section=ALL, config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}),
    Case(steps=4, section=ALL, zero={"reduce_scatter": False}),
    Case(steps=4, section=ALL, offload="cpu", dtype="bf16",
         zero={"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    *(
        Case(stage=3, offload=offload, steps=3, section=HUNDRED, accumulation=2, zero={"sub_group_size": 300, **zero})
        for offload, zero in (
            ("none", {"overlap_comm": True}),
            ("cpu", {"stage3_param_persistence_threshold": 0}),
            ("none", {"contiguous_gradients": False}),
            ("cpu", {"reduce_scatter": False}),
            ("cpu", {"offload_param": {"device": "cpu"}}),
        )
    ),
    *(Case(stage=3, offload=offload, steps=4, section=HUNDRED, model="net", decay_groups=True, dtype=dtype)
      for offload, dtype in (("none", "bf16"), ("cpu", "fp32"))),
    Case(stage=3, offload="cpu", dtype="bf16", steps=4, section=ALL, accumulation=3,
         config={"data_types": {"grad_accum_dtype": "fp32"}}),
]  # fmt: skip


def assert_plain(selective: dict[str, Any], plain: dict[str, Any]) -> None:
    assert_identical({key: plain[key] for key in SAME}, {key: selective[key] for key in SAME})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", SWEEP)
def test_policy_all_is_plain_deepspeed(workers, case, ranks):
    if loses_gradients(case):
        pytest.skip(LOST)
    for selective, plain in workers(ranks).run(train_all, [case, case.but(section=None)]):
        assert [blocks for _, _, blocks in selective["history"]] == [tuple(range(6))] * case.steps
        assert_plain(selective, plain)


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", VARIANTS, ids=case_id)
def test_all_blocks_selected_is_plain_deepspeed_with(workers, case, ranks):
    if loses_gradients(case):
        pytest.skip(LOST)
    for selective, plain in workers(ranks).run(train_all, [case, case.but(section=None)]):
        assert len(selective["history"][-1][2]) == len(selective["blocks"])
        assert_plain(selective, plain)


@pytest.mark.parametrize("ranks", [1, 2])
def test_policy_all_is_plain_deepspeed_under_autocast(fresh_workers, ranks):
    """DeepSpeed keeps "autocast is on" in a global: hence processes of its own."""
    cases = [
        Case(stage=stage, offload=offload, accumulation=2, clip=0.3, steps=3, section=section,
             config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
        for stage, offload, section in product((1, 2, 3), ("none", "cpu"), (ALL, None))
    ]  # fmt: skip
    for runs in fresh_workers(ranks).run(train_all, cases):
        for selective, plain in zip(runs[::2], runs[1::2], strict=True):
            assert_plain(selective, plain)


def train_with_own_groups(case: Case, section: dict[str, Any] | None) -> dict[str, Any]:
    """With the one param group of `model.parameters()`, through ds_agsel.initialize whatever the section."""
    import ds_agsel

    mend_plain_0189()  # whose engine this is where ours is off
    model = tiny_model(case)
    engine, optimizer, _, scheduler = ds_agsel.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config(case.but(section=section))
    )
    types = (type(engine), type(optimizer), type(engine.optimizer), type(scheduler))
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in types]
    has_selection = hasattr(engine, "selection")
    result = finish(engine, run_steps(engine, case)) | {"types": names, "has_selection": has_selection}
    model = tiny_model(case)
    plain = initialize_plain(model=model, model_parameters=model.parameters(), config=ds_config(case.but(section=None)))
    plain_types = [f"{kind.__module__}.{kind.__qualname__}" for kind in (type(plain), type(plain.optimizer))]
    return {"ours": result, "plain": finish(plain, run_steps(plain, case)), "plain_types": plain_types}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("section", [None, {"enabled": False}, {"enabled": False, "policy": "random", "seed": 7}])
def test_switched_off_everything_is_deepspeeds(workers, section, ranks):
    for result in workers(ranks).run(train_with_own_groups, Case(steps=3, offload="cpu"), section):
        ours = result["ours"]
        assert ours["types"][0] == result["plain_types"][0] == "deepspeed.runtime.engine.DeepSpeedEngine"
        assert ours["types"][1] == ours["types"][2] == result["plain_types"][1]
        assert not ours["has_selection"]
        assert len(ours["partitions"]) == 1
        assert_plain(ours, result["plain"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_policy_all_agrees_with_plain_deepspeed_on_the_users_own_groups(workers, ranks):
    """The norm's order of summation differs, so that clipping rounds otherwise: 1e-6 of the movement, then fed back."""
    case = Case(steps=4, clip=0.3)
    start = tiny_model(case).state_dict()
    for result in workers(ranks).run(train_with_own_groups, case, ALL):
        for name, expected in result["plain"]["weights"].items():
            assert relative_error(expected, result["ours"]["weights"][name], start[name]) <= 3e-3, name


def plain_before_and_after(case: Case) -> list[dict[str, Any]]:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    watched = (deepspeed, DeepSpeedEngine, DeepSpeedZeroOptimizer, deepspeed.ops.adam.DeepSpeedCPUAdam)
    plain = case.but(section=None)
    first = finish(engine := build(plain), run_steps(engine, plain))
    before = [dict(vars(owner)) for owner in watched]
    finish(engine := build(case), run_steps(engine, case))
    changed = [
        f"{owner.__name__}.{name}"
        for owner, attributes in zip(watched, before, strict=True)
        for name, value in vars(owner).items()
        if name != "optimizer_id" and attributes.get(name, ...) is not value
    ]
    return [first, finish(engine := build(plain), run_steps(engine, plain)), changed]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_selective_run_leaves_nothing_behind_in_deepspeed(workers, offload, ranks):
    for first, second, changed in workers(ranks).run(plain_before_and_after, Case(steps=4, offload=offload)):
        assert changed == []
        assert_plain(first, second)


def test_the_callers_dict_is_not_edited(workers):
    for before, after in workers(1).run(initialize_with_dict, Case()):
        assert before == after
        assert before["optimizer"]["params"]["lr"] == LEARNING_RATE


def initialize_with_dict(case: Case) -> list[dict[str, Any]]:
    import copy

    import ds_agsel

    config = ds_config(case)
    before = copy.deepcopy(config)
    engine = ds_agsel.initialize(model=tiny_model(case), config=config)[0]
    finish(engine, run_steps(engine, case, 0, 1))
    return [before, config]
