"""Rows chosen block by block under ZeRO: masked gradients, all rows as plain DeepSpeed, the choice of blocks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import reference_gast as twin
import torch
from support import (
    BATCH,
    MOSTLY_TWO,
    TOPK,
    VISIT,
    Case,
    assert_identical,
    batch,
    build,
    case_id,
    finish,
    forward_backward,
    model_blocks,
    run_steps,
    tiny_model,
    train_all,
)
from torch import Tensor

from ds_agsel.errors import ConfigError, TrainingError
from ds_agsel.gast_section import GastConfig
from ds_agsel.samples.choice import DrawKey, take

ALL_ROWS = {"policy": "all", "gast": {"select_samples": BATCH}}
FIXED = {"policy": "fixed", "fixed_blocks": ["model.layers.1", "model.layers.3", "embedding"]}
MATRICES = {"policy": "random", "granularity": "module", "select_percent": 40}
SAME = ("losses", "norms", "lrs", "weights", "partitions", "skipped")

WIDE = [
    Case(stage=stage, offload=offload, dtype=dtype, accumulation=accumulation, clip=0.3, steps=3, section=ALL_ROWS)
    for stage, offload, dtype, accumulation in product((1, 2, 3), ("none", "cpu"), ("fp32", "bf16"), (1, 3))
]
CORE = [WIDE[0], WIDE[7], WIDE[11], WIDE[12], WIDE[17], WIDE[23]]
SWEEP = [pytest.param(case, marks=[] if case in CORE else pytest.mark.slow, id=case_id(case)) for case in WIDE]


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", SWEEP)
def test_all_rows_taken_is_plain_deepspeed(workers: Any, case: Case, ranks: int) -> None:
    for gast, plain in workers(ranks).run(train_all, [case, case.but(section=None)]):
        assert_identical({key: plain[key] for key in SAME}, {key: gast[key] for key in SAME})


def masked(case: Case, checkpointing: str | None = None) -> dict[str, Any]:
    """The first step's gradients of the selected blocks, and what the twin expects; and the blocks by index."""
    from deepspeed.utils import safe_get_full_grad

    model: Any = tiny_model(case)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = build(case, model)
    engine.train()
    for micro_step in range(case.accumulation):
        forward_backward(engine, case, 0, micro_step)
        if micro_step + 1 < case.accumulation:
            engine.step()
    found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    engine.step()
    record, samples = engine.selection.history[0], engine.selection.samples.history[0]
    blocks = {block.index: list(block.parameter_names) for block in engine.selection.blocks}
    result = {
        "blocks": record.blocks,
        "names": blocks,
        "found": found,
        "expected": expected(case, blocks if record.phase == "explore" else {b: blocks[b] for b in record.blocks}),
        "samples": samples.as_json(),
    }
    engine.destroy()
    return result


def expected(case: Case, gated: dict[int, list[str]]) -> dict[str, Tensor]:
    """The mean over ranks and micro-steps of the twin's masked gradients."""
    config = GastConfig(**(case.section or {})["gast"])
    model, rank = tiny_model(case), torch.distributed.get_rank()
    layers = {block: names for block, names in gated.items() if "layers" in names[0]}
    total: dict[str, Tensor] = {}
    for micro_step in range(case.accumulation):

        def taken(block: int, scores: Tensor, micro_step: int = micro_step) -> list[int]:
            key = DrawKey((case.section or {}).get("seed", 42), 0, micro_step, rank, block)
            found = take(config, BATCH, key, None if config.draw == "random" else scores, scores.device)
            assert found is not None
            return found.tolist()

        for name, gradient in twin.masked_gradient(model, batch(case, 0, micro_step, rank), layers, taken).items():
            total[name] = total.get(name, 0) + gradient / case.accumulation
    for gradient in total.values():
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return total


def assert_masked(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        for block in run["blocks"]:
            for name in run["names"][block]:
                torch.testing.assert_close(run["found"][name], run["expected"][name], rtol=2e-4, atol=1e-6)


MASKED = [
    Case(stage=stage, offload=offload, accumulation=accumulation, section={**section, "gast": gast})
    for (stage, offload), accumulation, section, gast in (
        ((1, "none"), 1, FIXED, {}),
        ((1, "cpu"), 2, FIXED, {"draw": "random"}),
        ((2, "none"), 2, TOPK, {}),
        ((2, "cpu"), 1, FIXED, {"draw": "top"}),
        ((2, "none"), 1, {**FIXED, **VISIT}, {}),
        ((3, "none"), 2, FIXED, {"draw": "random"}),
        ((3, "none"), 1, FIXED, {}),
        ((3, "cpu"), 2, FIXED, {}),
        ((3, "none"), 1, TOPK, {}),
        ((2, "none"), 2, MATRICES, {}),
    )
]


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", MASKED, ids=case_id)
def test_gradients_are_the_mean_of_each_ranks_masked_ones(workers: Any, case: Case, ranks: int) -> None:
    runs = workers(ranks).run(masked, case)
    assert_masked(runs)
    assert all(run["samples"]["rows"] == [BATCH] * case.accumulation for run in runs)


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("stage", [2, 3])
def test_activation_checkpointing(workers: Any, stage: int, checkpointing: str) -> None:
    case = Case(stage=stage, section={**FIXED, "gast": {}})
    assert_masked(workers(2).run(masked, case, checkpointing))


def scores_of(gradients: dict[str, Tensor], blocks: list[list[str]]) -> list[float]:
    return [sum(gradients[name].norm().item() for name in names) for names in blocks]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_explore_step_chooses_by_the_masked_gradients(workers: Any, stage: int) -> None:
    case = Case(stage=stage, section={**TOPK, "gast": {"select_samples": 1}})
    blocks = list(model_blocks(tiny_model(case)).values())
    for run in workers(2).run(masked, case):
        scores = scores_of(run["expected"], blocks)
        assert run["blocks"] == tuple(sorted(sorted(range(6), key=lambda block: -scores[block])[:2]))


def resumed(case: Case, folder: str, stop: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """A whole run, and one that is saved after ``stop`` steps and goes on in another engine; its rows."""
    whole = train_all([case])[0]
    engine = build(case)
    run_steps(engine, case, last=stop)
    engine.save_checkpoint(folder, tag="t")
    engine.destroy()
    engine = build(case)
    engine.load_checkpoint(folder, tag="t")
    result = run_steps(engine, case, first=stop)
    rows = [step.as_json() for step in engine.selection.samples.history]
    return whole, finish(engine, result), rows


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_draws_the_same_rows_without_any_state(workers: Any, tmp_path: Any, stage: int) -> None:
    case = Case(stage=stage, steps=4, accumulation=2, section={**FIXED, "gast": {}})
    for whole, later, rows in workers(2).run(resumed, case, str(tmp_path), 2):
        assert_identical({key: whole[key] for key in ("weights", "partitions")}, {key: later[key] for key in SAME[3:5]})
        assert len(rows) == 2 and all(line["rows"] == [BATCH, BATCH] for line in rows)


def compile_refusal() -> str:
    engine = build(Case(section={"gast": {}}))
    with pytest.raises(ConfigError) as caught:
        engine.compile()
    engine.destroy()
    return str(caught.value)


def test_compiling_the_layers_is_refused(workers: Any) -> None:
    [message] = workers(1).run(compile_refusal)
    assert message.startswith("engine.compile() can't be used with adagrad_select.gast")


def interrupted() -> list[Any]:
    """Rows of a step whose first backward was abandoned, and of one that was not."""
    case, found = Case(section={**FIXED, "gast": {}}, steps=1), []
    for fails in (True, False):
        engine = build(case)
        if fails:
            loss = engine(**batch(case, 5, 0, 0)).loss
            loss.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.backward(loss)
        run_steps(engine, case)
        found.append((engine.selection.samples.history[0].as_json(), finish(engine, {})["weights"]))
    return found


def test_an_abandoned_window_leaves_no_trace(workers: Any) -> None:
    [(after_failure, straight)] = workers(1).run(interrupted)
    assert_identical(straight, after_failure)


# -------------------------------------------------------------------------- support data

SUPPORT = {"support": "data", "support_samples": 3}
PARTED = {"stage3_param_persistence_threshold": 0}


def support_rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(37, (8, 8), generator=torch.Generator().manual_seed(9))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def by_support(case: Case) -> dict[str, Any]:
    """The rows that each block took in the first step, those of the highest scores by row-by-row gradients, gradients
    of a parameter that is no Linear's before any backward, and whether the random stream is where it was."""
    engine = build(case, support_data=support_rows())
    engine.train()
    rank = torch.distributed.get_rank()
    drawn = engine.optimizer.window._support_data.indices(0)
    model = tiny_model(case)
    wanted = {name: batched for name, batched in (("batch", batch(case, 0, 0, rank)),)}["batch"]
    rows = twin.row_gradients(model, wanted)
    support = twin.row_gradients(model, {k: torch.stack([support_rows()[i][k] for i in drawn]) for k in wanted})
    expected = {}
    for block, names in enumerate(model_blocks(model).values()):
        gated = twin.gated_names(model, names) if "layers" in names[0] else []
        scores = [sum((row[n] * sum(s[n] for s in support)).sum() for n in gated) for row in rows]
        expected[block] = max(range(BATCH), key=lambda row, scores=scores: float(scores[row]))
    before = torch.random.get_rng_state()
    loss = engine(**wanted).loss
    untouched = torch.equal(before, torch.random.get_rng_state())
    quiet = all(p.grad is None for p in engine.module.parameters()) and engine.module.training
    engine.backward(loss)
    engine.step()
    step = engine.selection.samples.history[0]
    taken = {block: step.taken(block)[0] for block in step.blocks}
    engine.destroy()
    return {"taken": taken, "expected": expected, "quiet": quiet and untouched, "drawn": drawn}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("section", [FIXED, {"policy": "all"}], ids=["fixed", "all"])
def test_rows_are_scored_against_support_data(workers: Any, section: dict[str, Any], stage: int) -> None:
    case = Case(stage=stage, section={**section, "gast": {**SUPPORT, "draw": "top"}}, zero=PARTED)
    runs = workers(2).run(by_support, case)
    for run in runs:
        assert run["taken"] and run["quiet"]
        assert run["taken"] == {block: (run["expected"][block],) for block in run["taken"]}
    assert runs[0]["drawn"] != runs[1]["drawn"]


def by_stages(case: Case) -> list[dict[str, Any]]:
    """Runs of stages 2 and 3: rows taken, weights, and whether DeepSpeed knew the order of a step's modules."""
    found = []
    for stage in (2, 3):
        engine = build(case.but(stage=stage), support_data=support_rows())

        def knows(event: str, engine: Any, step: int) -> bool | None:
            is_traced = event == "backward" and step > 0 and hasattr(engine.optimizer, "parameter_offload")
            return engine.optimizer.parameter_offload.param_coordinator.is_complete_trace() if is_traced else None

        result = run_steps(engine, case, observe=knows)
        rows = [step.as_json() for step in engine.selection.samples.history]
        found.append({"rows": rows, "known": result["observed"], "weights": finish(engine, result)["weights"]})
    return found


@pytest.mark.parametrize(
    "more", [FIXED, {"policy": "all", "sparse_grad": {"entries_percent": 20.0, "calibration_steps": 1}}],
    ids=["fixed", "entries"],
)  # fmt: skip
def test_a_support_pass_does_not_disturb_zero_3(workers: Any, more: dict[str, Any]) -> None:
    case = Case(steps=4, section={**more, "gast": SUPPORT}, zero=PARTED)
    for two, three in workers(2).run(by_stages, case):
        assert three["rows"] == two["rows"]
        assert three["known"] and all(three["known"])
        for name, weight in two["weights"].items():
            torch.testing.assert_close(three["weights"][name], weight, rtol=1e-4, atol=1e-5)


def support_refusals() -> list[str]:
    messages = []
    for section, data in (({"gast": SUPPORT}, None), ({"gast": {}}, support_rows()), ({"gast": SUPPORT}, iter(()))):
        with pytest.raises(ConfigError) as caught:
            build(Case(section=section), support_data=data)
        messages.append(str(caught.value))
    case = Case(model="net", section={"policy": "all", "gast": SUPPORT})
    model: Any = tiny_model(case)
    model.checkpointing = "reentrant"  # in evaluation mode, too
    engine = build(case, model, support_data=support_rows())
    with pytest.raises(TrainingError) as hidden:
        engine(**batch(case, 0, 0, 0))
    engine.destroy()
    return [*messages, str(hidden.value)]


def test_support_data_and_its_setting_go_together(workers: Any) -> None:
    [messages] = workers(1).run(support_refusals)
    assert "needs support data, which was not given" in messages[0]
    assert "is read only with adagrad_select.gast.support" in messages[1]
    assert "has no rows that can be drawn by their index" in messages[2]
    assert "reached none of the selected blocks" in messages[3] and "use_reentrant=False" in messages[3]
