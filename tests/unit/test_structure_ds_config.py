"""Only ds_agsel/ds_config/ looks up settings of a ds_config by their names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READER = ROOT / "ds_agsel" / "ds_config"
NAMES = frozenset(
    {
        "zero_optimization", "offload_optimizer", "offload_param", "nvme_path", "bf16", "bfloat16", "fp16",
        "torch_autocast", "data_types", "train_batch_size", "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps", "gradient_clipping", "reduce_bucket_size", "sub_group_size", "overlap_comm",
        "max_live_parameters", "stage3_max_live_parameters", "stage3_param_persistence_threshold", "cpu_offload",
    }
)  # fmt: skip
FILES = [
    path
    for folder in ("ds_agsel", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if READER not in path.parents and "examples" not in path.parts
]


def looked_up(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each constant that is a subscript, the first argument of get, pop or setdefault, or stands before ``in``."""
    for node in ast.walk(tree):
        keys: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keys = node.args[:1] if node.func.attr in ("get", "pop", "setdefault") else []
        elif isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            keys = [node.left]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield node.lineno, key.value


def readings(source: str) -> list[tuple[int, str]]:
    return [(line, name) for line, name in looked_up(ast.parse(source)) if name in NAMES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_reads_the_ds_config(path: Path) -> None:
    found = readings(path.read_text(encoding="utf-8"))
    assert not found, f"{path.relative_to(ROOT)} reads {found}: ask ds_agsel.ds_config.DsConfig instead"


def test_the_search_finds_every_form() -> None:
    source = "a['bf16']; a.get('fp16', {}); 'bfloat16' in a; a.pop('nvme_path'); b = {'bf16': 1}; a['other']"
    assert [name for _, name in readings(source)] == ["bf16", "fp16", "bfloat16", "nvme_path"]
    assert all(readings(path.read_text(encoding="utf-8")) for path in READER.glob("[re]*.py"))
