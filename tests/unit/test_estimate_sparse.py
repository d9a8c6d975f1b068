"""The estimate of `sparse_grad` by hand-computed cases; tests/numerics/test_estimator.py compares real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_agsel import cli
from ds_agsel.config import parse_section
from ds_agsel.estimate.memory import selective_memory
from ds_agsel.estimate.models import build_on_meta, known_models
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import read_shape, shape_of
from ds_agsel.estimate.sparse_shape import Matrix, SparseShape
from ds_agsel.estimate.steps import exact_step
from ds_agsel.estimate.traffic import selective_traffic

CONFIGS = Path(__file__).parents[2] / "configs"
MATRIX = Matrix(block=1, lines=6, directions=5, entries=3, basis="a")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(known_models()["smollm2"] | {"num_hidden_layers": 2}))
    return file


def test_a_rank_of_zero_3_has_its_slice_without_padding():
    shape = SparseShape((MATRIX,), "model", refreshes=True)
    assert shape.held_numels(2, 4, 3) == (30,)
    assert [shape.held_numels(3, 4, rank) for rank in range(4)] == [(8,), (8,), (8,), (6,)]


@pytest.mark.parametrize(
    ("rotation", "support", "energy"),
    [
        ("model", 4 * 3 + 8 * 3 + 2 * 5 * 3, 4 * (6 + 25)),
        ("none", 4 * 3 + 8 * 3 + 8 * 3, 4 * (6 + 5)),
        ("both", 4 * 3 + 8 * 3 + 2 * (5 * 3 + 36), 4 * (6 + 25 + 36)),
    ],
)
def test_bases_and_energies_by_rotation(rotation, support, energy):
    shape = SparseShape((MATRIX,), rotation, refreshes=True)
    assert (shape.support_bytes(2), shape.energy_bytes()) == (support, energy)
    writing = 30 * (2 + 4 * 4)
    assert shape.accelerator_bytes(2) == support + energy + writing
    assert SparseShape((MATRIX,), rotation, refreshes=False).accelerator_bytes(2) == max(support, energy) + writing
    shared = SparseShape((MATRIX, MATRIX), rotation, refreshes=True)
    assert (shared.support_bytes(2), shared.energy_bytes()) == (support, energy)


def test_zero_3_gathers_an_unreached_matrix_once_and_a_large_carrier_before_it_writes(config_file):
    setup = Setup(stage=3, ranks=2, persistence_threshold_numel=0, offload_param="cpu")
    section = parse_section({"sparse_grad": {"entries_percent": 1.0}}).sparse_grad
    model = read_shape(str(config_file), sparse_grad=section)
    matrices = model.sparse.matrices
    blocks = range(len(model.blocks))
    low, high = (exact_step("exploit", len(blocks), [block], blocks, blocks) for block in (1, 2))
    by_low, by_high = (selective_traffic(model, setup, "resident", step) for step in (low, high))
    first = [matrix for matrix in matrices if matrix.block == 1]
    layer = sum(
        numel for group, block in zip(model.groups, model.block_of_group, strict=True) if block == 1 for numel in group
    )
    assert by_low.gathered - by_high.gathered == 2 * (sum(matrix.numel for matrix in first) + layer)
    bases = sum(matrix.numel for matrix in first) // 2 * 2  # half of each, 2 bytes an element
    assert by_low.h2d == bases + by_low.gathered // 2


def test_estimate_has_entries_where_the_section_has_them_and_compares_with_the_whole_model(
    config_file, capsys, tmp_path
):
    def rows(file: Path) -> list:
        assert cli.main(["estimate", "--model", str(config_file), "--ds-config", str(file), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    config = json.loads((CONFIGS / "sparse_grad.json").read_text())
    sparse = rows(CONFIGS / "sparse_grad.json")
    del config["adagrad_select"]["sparse_grad"]
    (tmp_path / "dense.json").write_text(json.dumps(config))
    dense = rows(tmp_path / "dense.json")
    for method in ("full", "lora"):
        assert [row for row in sparse if row["method"] == method] == [row for row in dense if row["method"] == method]
    one, other = (next(row for row in rows if row["method"] == "ds_agsel")["bytes"] for rows in (sparse, dense))
    numel, entries = 2 * 3 * 576 * 1536, 2 * 3 * 8847
    assert other["host"]["master_weights"] - one["host"]["master_weights"] == 4 * (numel - entries - 2)  # of padding
    assert one["host"]["weights"] == 2 * numel
    assert one["accelerator"]["weights"] - other["accelerator"]["weights"] == 2 * (entries + 2)
    assert cli.main(["estimate", "--model", str(config_file), "--ds-config", str(CONFIGS / "sparse_grad.json")]) == 0
    assert f"sparse_grad trains {entries:,} of the {numel:,} elements of 6 matrices." in capsys.readouterr().out


def test_a_model_is_as_it_was_when_its_shape_is_known(config_file):
    model = build_on_meta(str(config_file))
    names = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    section = parse_section({"sparse_grad": {}}).sparse_grad
    shape = shape_of("small", model, sparse_grad=section)
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == names
    step = exact_step("exploit", len(shape.blocks), [1], [0, 1, 2, 3], [1])
    held = selective_memory(shape, Setup(), "resident", step)
    assert held.host.weights == 2 * 2 * 3 * 576 * 1536
    assert held.host.total == 2 * 3 * 2**21  # each matrix is page-locked by itself
