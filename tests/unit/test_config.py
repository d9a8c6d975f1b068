"""The section: defaults, "not set", and the full text of every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ds_agsel.config import (
    OWN_POLICIES,
    SECTION,
    SelectionConfig,
    did_you_mean,
    find_section,
    parse_section,
)
from ds_agsel.errors import ConfigError

FIELDS = ", ".join(SelectionConfig.model_fields)

# The top-level keys of DeepSpeed 0.19's documentation: none may be taken for a misspelt section.
DEEPSPEED_KEYS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "autotuning",
    "flops_profiler",
    "activation_checkpointing",
    "sparse_attention",
    "data_efficiency",
    "curriculum_learning",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "monitor_config",
    "elasticity",
    "checkpoint",
    "data_types",
    "comms_logger",
    "compression_training",
    "compile",
    "timers",
    "pipeline",
    "tensor_parallel",
    "eigenvalue",
    "progressive_layer_drop",
    "use_data_before_expert_parallel_",
    "graph_harvesting",
    "nebula",
    "hybrid_engine",
]


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_section(fields)
    return str(caught.value)


def test_the_empty_section_is_the_documented_default() -> None:
    assert parse_section({}).model_dump() == {
        "enabled": True,
        "preset": None,
        "policy": "adagrad_select",
        "granularity": "block",
        "select_percent": 20.0,
        "select_every": 1,
        "explore_rate": 1.0,
        "explore_decay": None,
        "smoothing": 1.0,
        "exploit_draw": "sample",
        "score": "sum",
        "score_decay": 0.8,
        "temperature": 1.0,
        "refresh_every": None,
        "probe_steps": 5,
        "always_select": (),
        "never_select": (),
        "steps_per_epoch": None,
        "seed": 42,
        "step_device": None,
        "keep_master": "host",
        "state_budget_bytes": None,
        "on_reentry": "keep",
        "state_dtype": "fp32",
        "master_weights": "fp32",
        "explore_on": "batch",
        "blocks": None,
        "fixed_blocks": None,
        "replay_file": None,
        "gast": None,
        "sparse_grad": None,
    }


@pytest.mark.parametrize("unset", [None, "auto"])
def test_null_and_auto_mean_not_set_for_every_field(unset: str | None) -> None:
    assert parse_section(dict.fromkeys(SelectionConfig.model_fields, unset)) == SelectionConfig()


def test_every_field_is_read_and_the_users_dict_is_left_as_it_was() -> None:
    section = {
        "enabled": False,
        "policy": "fixed",
        "select_percent": 10,
        "select_every": 5,
        "explore_rate": 0,
        "explore_decay": 0.5,
        "smoothing": 1e-6,
        "exploit_draw": "top",
        "score": "rms",
        "always_select": ["embedding"],
        "never_select": ["head"],
        "steps_per_epoch": 100,
        "seed": 0,
        "step_device": "cpu",
        "blocks": {"embedding": ["a.*"], "head": ["b.*", "c"]},
        "fixed_blocks": ["final_norm"],
        "replay_file": None,
    }
    before = {key: value.copy() if isinstance(value, (dict, list)) else value for key, value in section.items()}
    config = parse_section(section)
    assert section == before
    assert config.always_select == ("embedding",)
    assert config.blocks == {"embedding": ("a.*",), "head": ("b.*", "c")}
    assert config.fixed_blocks == ("final_norm",)
    assert config.select_percent == 10.0 and isinstance(config.select_percent, float)
    # json and back (a checkpoint keeps it) is the same section
    assert parse_section(config.model_dump(mode="json")) == config


def test_the_config_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SelectionConfig().seed = 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("select_percent", 140, "=140 is outside (0, 100]. Use 100 to train every block."),
        ("select_percent", 0, "=0 is outside (0, 100]. Use 100 to train every block."),
        ("select_percent", -1.5, "=-1.5 is outside (0, 100]. Use 100 to train every block."),
        ("select_percent", float("nan"), "=NaN is outside (0, 100]. Use 100 to train every block."),
        ("select_percent", "20", '="20" is not a number. Use 100 to train every block.'),
        ("select_percent", True, "=true is not a number. Use 100 to train every block."),
        (
            "explore_rate",
            1.01,
            "=1.01 is outside [0, 1]. Use 1 to explore at the first step, 0 to never explore.",
        ),
        (
            "explore_rate",
            [1],
            "=[1] is not a number. Use 1 to explore at the first step, 0 to never explore.",
        ),
        ("explore_decay", -1, "=-1 is outside [0, inf). Use null for ln(100) / steps_per_epoch."),
        (
            "explore_decay",
            float("inf"),
            "=Infinity is outside [0, inf). Use null for ln(100) / steps_per_epoch.",
        ),
        ("smoothing", 0, "=0 is outside (0, inf). Use 1.0; less than that favours blocks updated often."),
        (
            "steps_per_epoch",
            0,
            "=0 is outside [1, inf). Use the optimizer steps in one pass over the data, or null",
        ),
        (
            "steps_per_epoch",
            10.0,
            "=10.0 is not an integer. Use the optimizer steps in one pass over the data",
        ),
        (
            "steps_per_epoch",
            True,
            "=true is not an integer. Use the optimizer steps in one pass over the data",
        ),
        ("select_every", 0, "=0 is outside [1, inf). Use 1 to select anew at every step."),
        ("select_every", 2.0, "=2.0 is not an integer. Use 1 to select anew at every step."),
        ("seed", -1, "=-1 is outside [0, inf). Use 42, or any integer from 0 on."),
        ("seed", False, "=false is not an integer. Use 42, or any integer from 0 on."),
        ("gast", 4, "=4 is not an object. Use {} for all its defaults, or null to learn from all rows."),
        ("gast", {"select_samples": 0}, ".select_samples=0 is outside [1, inf). Use null for half of the micro-batch."),
        ("gast", {"draw": "best"}, '.draw="best" is not "sample", "random" or "top". Use "sample" to draw rows in'),
        ("gast", {"support": 1}, '.support=1 is not "batch" or "data". Use "batch" to score rows against the rest'),
        ("gast", {"support_samples": 1.5}, ".support_samples=1.5 is not an integer. Use 4, or any number of rows"),
        ("gast", {"drew": "top"}, ' has no field "drew". Did you mean "draw"? Its fields: select_samples, support,'),
        (
            "gast",
            {"support": "data", "draw": "random"},
            '.support="data" and adagrad_select.gast.draw="random" exclude',
        ),
        ("enabled", 1, "=1 is not true or false. Use false to run plain DeepSpeed."),
        ("enabled", "false", '="false" is not true or false. Use false to run plain DeepSpeed.'),
        (
            "preset",
            "Lisa",
            '="Lisa" is not one of "recommended", "adagrad_select", "badam", "lisa", "misa", "grass". '
            "Use null to set the fields",
        ),
        ("policy", 3, '=3 is not a policy\'s name. Use "adagrad_select", or a name that you registered.'),
        ("policy", "", '="" is not a policy\'s name. Use "adagrad_select", or a name that you registered.'),
        (
            "exploit_draw",
            "topk",
            '="topk" is not "sample" or "top". Use "sample" to draw blocks in proportion to p.',
        ),
        ("score", "l2", '="l2" is not "sum", "norm" or "rms". Use "sum" for the sum of the norms'),
        ("score_decay", 1, "=1 is outside [0, 1). Use 0.8; 0 forgets all but the newest period."),
        ("score_decay", -0.1, "=-0.1 is outside [0, 1). Use 0.8"),
        ("temperature", 0, "=0 is outside (0, inf). Use 1.0; less than that favours high scores more."),
        ("refresh_every", 0, "=0 is outside [1, inf). Use null for a period as long as a selection stands."),
        ("probe_steps", 0, "=0 is outside [1, inf). Use 5; these steps score every block and update none."),
        (
            "always_select",
            "embedding",
            '="embedding" is not a list of block names. Write it as ["embedding"], or []',
        ),
        (
            "always_select",
            ["a", 1],
            '=["a", 1] is not a list of block names. Write it as ["embedding"], or []',
        ),
        (
            "never_select",
            {"a": 1},
            '={"a": 1} is not a list of block names. Write it as ["embedding"], or []',
        ),
        (
            "step_device",
            "gpu",
            '="gpu" is not "cpu", "accelerator" or null. Use null to follow offload_optimizer and the memory',
        ),
        ("keep_master", "gpu", '="gpu" is not "host" or "accelerator". Use "host"'),
        (
            "master_weights",
            "bf16",
            '="bf16" is not "fp32" or "split". Use "fp32": master weights rest as they are updated.',
        ),
        ("state_dtype", "fp16", '="fp16" is not "fp32", "bf16" or "int8". Use "fp32": moments rest as they are'),
        ("on_reentry", "drop", '="drop" is not "keep", "reset" or "decay". Use "keep": moments wait for'),
        ("state_budget_bytes", 0, "=0 is outside [1, inf). Use null for the largest selection and two blocks more."),
        ("explore_on", "epoch", '="epoch" is not "batch" or "first_micro_batch". Use "batch"'),
        (
            "blocks",
            ["a"],
            '=["a"] is not a map from block name to a list of regular expressions. Write it as {',
        ),
        ("blocks", {"a": "b"}, '={"a": "b"} is not a map from block name to a list of regular expressions.'),
        ("blocks", {}, "={} is empty. Use null for the automatic blocks."),
        ("blocks", {"a": []}, '["a"]=[] is empty. Give it a regular expression, or remove it.'),
        (
            "blocks",
            {"a": ["("]},
            '["a"] has the pattern "(", which is not a regular expression: missing ), un',
        ),
        ("fixed_blocks", "a", '="a" is not a list of block names. Write it as ["embedding", "head"].'),
        ("fixed_blocks", [], "=[] is empty. Name at least one block to update."),
        ("replay_file", 1, "=1 is not a path. Use the path of an earlier run's selection.jsonl."),
        ("replay_file", "", '="" is not a path. Use the path of an earlier run\'s selection.jsonl.'),
    ],
)
def test_a_bad_value_is_refused_with_setting_value_range_and_remedy(field: str, value: Any, message: str) -> None:
    others = {"fixed_blocks": {"policy": "fixed"}, "replay_file": {"policy": "replay"}}.get(field, {})
    said = refusal(**others, **{field: value})
    assert said.startswith(f"{SECTION}.{field}{message}")
    assert "pydantic" not in said and "\n" not in said


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("select_percentage", "select_percent"), ("Seed", "seed"), ("explorerate", "explore_rate")],
)
def test_an_unknown_field_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    assert refusal(**{key: 1}) == f'{SECTION} has no field "{key}". Did you mean "{nearest}"? Its fields: {FIELDS}.'


def test_an_unknown_field_that_is_near_to_none_lists_the_fields() -> None:
    assert refusal(zzz=None) == f'{SECTION} has no field "zzz". Its fields: {FIELDS}.'
    with pytest.raises(ConfigError, match=r"has no field 7\. Its fields"):
        parse_section({7: 1})  # type: ignore[dict-item]


def test_the_constructor_refuses_as_the_parser_does() -> None:
    with pytest.raises(ConfigError, match=re.escape("adagrad_select.seed=-1 is outside [0, inf).")):
        SelectionConfig(seed=-1)
    with pytest.raises(ConfigError, match=r'has no field "sede". Did you mean "seed"'):
        SelectionConfig(sede=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"always_select": ["head", "a"], "never_select": ["a", "b"]},
            (
                'always_select and adagrad_select.never_select both name "a". A block is updated at every'
                " step or at none"
            ),
        ),
        (
            {"policy": "fixed"},
            'policy="fixed" needs adagrad_select.fixed_blocks, which is not set. Write it as [',
        ),
        (
            {"policy": "replay"},
            'policy="replay" needs adagrad_select.replay_file, which is not set. Use the path of',
        ),
        (
            {"fixed_blocks": ["head"]},
            (
                'fixed_blocks=["head"] is only for adagrad_select.policy="fixed", and the policy is'
                ' "adagrad_select". Remove fixed_blocks, or set the policy to "fixed".'
            ),
        ),
        (
            {"policy": "all", "replay_file": "x"},
            'replay_file="x" is only for adagrad_select.policy="replay", and the policy is "all".',
        ),
        (
            {"policy": "replay", "replay_file": "x", "never_select": ["a"]},
            (
                'policy="replay" and adagrad_select.never_select=["a"] exclude each other: the replayed file'
                " already says which blocks are updated. Remove adagrad_select.never_select."
            ),
        ),
        (
            {"policy": "random", "temperature": 0.5},
            (
                'temperature=0.5 is not read by adagrad_select.policy="random", but by "cost_aware", "grass",'
                ' "misa". Remove'
                " temperature, or set the policy to one of these."
            ),
        ),
        (
            {"policy": "misa", "probe_steps": 9},
            'probe_steps=9 is not read by adagrad_select.policy="misa", but by "cost_aware", "grass".',
        ),
        (
            {"policy": "grass", "explore_on": "first_micro_batch"},
            'explore_on="first_micro_batch" can\'t be used with adagrad_select.policy="grass", whose probing steps',
        ),
        (
            {"policy": "replay", "replay_file": "x", "select_every": 5},
            (
                'policy="replay" and adagrad_select.select_every=5 exclude each other: the replayed file already has'
                " the blocks of every step. Remove adagrad_select.select_every."
            ),
        ),
        (
            {"policy": "replay", "replay_file": "x", "always_select": ["a"]},
            'policy="replay" and adagrad_select.always_select=["a"] exclude each other',
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused_naming_both(fields: dict[str, Any], message: str) -> None:
    assert refusal(**fields).startswith(f"{SECTION}.{message}")


@pytest.mark.parametrize("section", [None, True, [], "on"])
def test_a_section_that_is_no_object_is_refused(section: Any) -> None:
    with pytest.raises(ConfigError, match=r"^adagrad_select=.* is not an object\. Use \{\} for all defaults"):
        find_section({SECTION: section})
    with pytest.raises(ConfigError, match=r"^adagrad_select=.* is not an object\. Use \{\} for all defaults"):
        parse_section(section)


def test_the_section_is_found_unread_and_absence_is_none() -> None:
    section = {"not": "checked yet"}
    assert find_section({"fp16": {}, SECTION: section}) is section
    assert find_section({}) is None
    assert find_section(dict.fromkeys(DEEPSPEED_KEYS)) is None
    assert find_section({1: 2}) is None  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "key",
    [
        "adagrad_selct",
        "adagradselect",
        "AdaGradSelect",
        "adagrad-select",
        "adagrad_selection",
        "adgrad_select",
        "ada_select",
        "ds_agsel",
        "agsel",
        "_adagrad_select",
    ],
)
def test_a_misspelt_section_is_refused_with_the_right_spelling(key: str) -> None:
    expected = (
        f'ds_config has the key "{key}", which nothing reads. Did you mean "adagrad_select"? Rename or remove it.'
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        find_section({"train_batch_size": 1, key: {}})


def test_a_near_miss_beside_the_section_is_left_alone() -> None:
    assert find_section({SECTION: {}, "adagrad_select_notes": "mine"}) == {}


def test_did_you_mean_ignores_case_and_keeps_silent_when_nothing_is_near() -> None:
    assert did_you_mean("HEAD", ["embedding", "head"]) == ' Did you mean "head"?'
    assert did_you_mean("xyz", ["embedding", "head"]) == ""


def test_fields_of_some_policies_are_open_to_a_policy_of_the_user_s_own() -> None:
    fields = {"score_decay": 0.5, "temperature": 2.0, "refresh_every": 3, "probe_steps": 9}
    assert parse_section({"policy": "mine", **fields}).temperature == 2.0
    assert parse_section({"policy": "random", "temperature": 1.0}).temperature == 1.0  # the default


def test_the_policies_of_this_package_are_known_by_name() -> None:
    from ds_agsel.policies.registry import _POLICIES

    ours = {name for name, cls in _POLICIES.items() if cls.__module__.startswith("ds_agsel.")}
    assert ours == set(OWN_POLICIES)
