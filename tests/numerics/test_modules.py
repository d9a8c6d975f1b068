"""Granularity "module": single matrices are chosen, up to a share of the parameters; nothing else is trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from plain_engines import initialize_plain
from reference_runs import assert_follows_reference
from support import (
    ALL,
    FIRST,
    MOSTLY_TWO,
    SELECT,
    VISIT,
    Case,
    assert_identical,
    build,
    case_id,
    ds_config,
    finish,
    is_matrix,
    model_units,
    param_groups,
    run_steps,
    tiny_model,
    train,
)

from ds_agsel.errors import CheckpointError

# As in test_reference.py, where the reason of each number stands.
FP32 = {"exp_avg": 1e-4, "exp_avg_sq": 1e-4, "masters": 3e-3}
# Four to six of 28 matrices a step; with this seed steps of both phases, as `SELECT` says.
MODULE = {**SELECT, "granularity": "module", "select_percent": 20}
NORMS = {
    **MODULE,
    "always_select": ["final_norm", "model.layers.1.norms"],
    "never_select": ["model.layers.2.mlp.up_proj"],
}

WIDE = [Case(section=MODULE, stage=stage, offload=offload) for stage, offload in product((1, 2, 3), ("none", "cpu"))]
VARIANTS = [
    Case(section=NORMS, clip=0.3, accumulation=2, decay_groups=True),
    Case(section={**MODULE, "policy": "random"}, stage=3, offload="cpu", clip=0.3, zero={"sub_group_size": 300}),
    Case(section={**MODULE, "policy": "cyclic"}, stage=1, offload="cpu", accumulation=2),
    Case(section={**MODULE, "policy": "gradient_topk"}, stage=2, offload="cpu", model="net"),
    Case(section={**MODULE, **VISIT}, stage=2, clip=0.3),
    Case(section={**MODULE, **FIRST, "select_percent": 10}, stage=3, accumulation=2),
]
BY_DEFAULT = {(1, "cpu", 2), (2, "none", 2), (2, "cpu", 1), (3, "none", 1), (3, "cpu", 2)}
SWEEP = [
    pytest.param(
        case,
        ranks,
        marks=[] if (case.stage, case.offload, ranks) in BY_DEFAULT else pytest.mark.slow,
        id=f"{case_id(case)}-{ranks}",
    )
    for case, ranks in product(WIDE, (1, 2))
] + [
    pytest.param(case, ranks, marks=[] if ranks == 2 and index < 2 else pytest.mark.slow, id=f"{case_id(case)}-{ranks}")
    for (index, case), ranks in product(enumerate(VARIANTS), (1, 2))
]


def numels(case: Case) -> dict[str, int]:
    model = tiny_model(case)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {unit: sum(sizes[name] for name in names) for unit, names in model_units(model).items()}


def assert_within_the_share(case: Case, history: Sequence[tuple[int, str, tuple[int, ...]]]) -> None:
    """No step exceeds the share of the lottery's parameters, or none by more than one unit where only one fits."""
    sizes = numels(case)
    names = list(sizes)
    outside = {*case.section.get("always_select", ()), *case.section.get("never_select", ())}
    lottery = {name for name in names if is_matrix(name) and name not in outside}
    limit = case.section["select_percent"] / 100 * sum(sizes[name] for name in lottery)
    for step, _, blocks in history:
        drawn = [names[block] for block in blocks if names[block] in lottery]
        assert drawn and (len(drawn) == 1 or sum(map(sizes.__getitem__, drawn)) <= limit), step
        assert {names[block] for block in blocks} - lottery == set(case.section.get("always_select", ()))


@pytest.mark.parametrize(("case", "ranks"), SWEEP)
def test_follows_the_reference_and_the_rest_is_bit_identical(trained, case, ranks):
    runs = trained(case, ranks)
    assert_follows_reference(case, runs, FP32)
    assert {phase for _, phase, _ in runs[0]["history"]} >= (
        {"explore", "exploit"} if "policy" not in case.section else set()
    )
    assert_within_the_share(case, runs[0]["history"])
    units = list(model_units(tiny_model(case)).values())
    for run in runs:
        for (_, _, blocks), before, after in zip(run["history"], run["observed"], run["observed"][1:], strict=False):
            moved = {name for block in blocks for name in units[block]}
            for name, weight in before["weights"].items():
                if name not in moved:
                    assert_identical(weight, after["weights"][name])
            for old, new in zip(before["partitions"], after["partitions"], strict=True):
                if not moved & set(old["shapes"]):
                    assert_identical(old, new)


def plain_of_the_matrices(case: Case) -> dict[str, Any]:
    """Plain DeepSpeed over one param group per matrix and group of the user's; the rest frozen."""
    model = tiny_model(case)
    units = {unit: names for unit, names in model_units(model).items() if is_matrix(unit)}
    named = dict(model.named_parameters())
    trained = {name for names in units.values() for name in names}
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    groups = [
        {**group, "params": [p for p in group["params"] if any(p is named[name] for name in names)]}
        for group in param_groups(model, case)
        for names in units.values()
    ]
    config, groups = ds_config(case.but(section=None)), [group for group in groups if group["params"]]
    engine = initialize_plain(model=model, model_parameters=groups, config=config)
    return finish(engine, run_steps(engine, case))


def ours_and_plain(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(case), plain_of_the_matrices(case)


ALL_BY_DEFAULT = {(1, "none", "bf16"), (2, "cpu", "bf16"), (3, "none", "fp32")}


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize(
    ("stage", "offload", "dtype"),
    [
        pytest.param(*axes, marks=[] if axes in ALL_BY_DEFAULT else pytest.mark.slow)
        for axes in product((1, 2, 3), ("none", "cpu"), ("fp32", "bf16"))
    ],
)  # fmt: skip
def test_policy_all_is_plain_deepspeed_on_the_matrices(workers, stage, offload, dtype, ranks):
    section = {**ALL, "granularity": "module"}
    case = Case(section=section, stage=stage, offload=offload, dtype=dtype, steps=3, clip=0.3, accumulation=2)
    for ours, plain in workers(ranks).run(ours_and_plain, case):
        names = list(ours["blocks"])
        assert [blocks for _, _, blocks in ours["history"]] == [
            tuple(index for index, name in enumerate(names) if is_matrix(name))
        ] * 3
        for key in ("losses", "norms", "weights"):
            assert_identical(plain[key], ours[key])
        of_plain = by_name(plain["partitions"])
        assert_identical(of_plain, {name: by_name(ours["partitions"])[name] for name in of_plain})


def by_name(partitions: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Partitions of groups of one parameter each, by its name."""
    return {next(iter(piece["shapes"])): piece for piece in partitions if len(piece["shapes"]) == 1}


def calls_of_a_step(section: Mapping[str, Any], layers: int, stage: int) -> int:
    """How many calls of ds_agsel's own functions a step makes that updates the matrices of one layer."""
    tiny = tiny_model(Case())
    config = type(tiny.config)(**{**tiny.config.to_dict(), "num_hidden_layers": layers})
    case = Case(section=section, stage=stage)
    engine = build(case, type(tiny)(config))
    run_steps(engine, case, 0, 3)
    calls = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and "/ds_agsel/" in frame.f_code.co_filename

    sys.setprofile(note)
    run_steps(engine, case, 3, 4)
    sys.setprofile(None)
    engine.destroy()
    return calls


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_not_selected_costs_no_more_calls_in_many_units_than_in_few(workers, stage):
    """A layer more is eight units more, and not one call more than the block that it is otherwise."""
    block = {"policy": "fixed", "fixed_blocks": ["model.layers.1"], "never_select": ["embedding", "final_norm"]}
    matrices = [unit for unit in model_units(tiny_model(Case())) if "layers.1." in unit and is_matrix(unit)]
    module = {"policy": "fixed", "granularity": "module", "fixed_blocks": matrices}
    grown = []
    for section in (block, module):
        few, many = (workers(1).run(calls_of_a_step, section, layers, stage)[0] for layers in (4, 12))
        grown.append((many - few) / 8)
    assert grown[1] <= grown[0] + 1, grown


def save(case: Case, folder: Path) -> dict[str, Any]:
    engine = build(case)
    run_steps(engine, case, 0, 4)
    engine.save_checkpoint(str(folder))
    return finish(engine, run_steps(engine, case, 4))


def resume(case: Case, folder: Path) -> dict[str, Any]:
    engine = build(case.but(seed=99))
    engine.load_checkpoint(str(folder))
    return finish(engine, run_steps(engine, case, 4))


@pytest.mark.parametrize(
    ("stage", "offload", "ranks"),
    [
        pytest.param(*axes, marks=[] if axes in {(2, "none", 2), (3, "cpu", 2)} else pytest.mark.slow)
        for axes in product((1, 2, 3), ("none", "cpu"), (1, 2))
    ],
)
def test_resume_is_bit_identical(workers, other_workers, tmp_path, stage, offload, ranks):
    case = Case(section={**MODULE, "always_select": ["model.layers.0.norms"]}, stage=stage, offload=offload)
    kept = ("weights", "partitions", "history", "counts", "plan", "blocks")
    saving = workers(ranks).run(save, case, tmp_path)
    for whole, resumed in zip(saving, other_workers(ranks).run(resume, case, tmp_path), strict=True):
        assert_identical({key: whole[key] for key in kept}, {key: resumed[key] for key in kept})


def of_the_other_granularity(folder: Path) -> list[str]:
    """What loading a checkpoint of each granularity into an engine of the other says; neither is changed by it."""
    cases = [Case(steps=1, section=MODULE), Case(steps=1, section=SELECT)]
    said = []
    for case in cases:
        engine = build(case)
        run_steps(engine, case)
        engine.save_checkpoint(str(folder / str(case.section.get("granularity"))))
        engine.destroy()
    for case, other in zip(cases, reversed(cases), strict=True):
        engine = build(case)
        path = str(folder / str(other.section.get("granularity")))
        try:
            engine.load_checkpoint(path)
        except CheckpointError as error:
            said.append(str(error))
        assert engine.selection.num_steps == 0
        engine.load_checkpoint(path, load_module_only=True)
        run_steps(engine, case)
        engine.destroy()
    return said


def test_a_checkpoint_of_the_other_granularity_is_refused_with_the_remedy(workers, tmp_path):
    [said] = workers(1).run(of_the_other_granularity, tmp_path)
    for found, saved, here in zip(said, ("block", "module"), ("module", "block"), strict=True):
        assert f'was saved with adagrad_select.granularity="{saved}", and here it is "{here}"' in found
        assert f'Set it to "{saved}", or load the weights alone: load_module_only=True.' in found
