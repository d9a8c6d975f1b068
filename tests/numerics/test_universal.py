"""`ds-agsel universal`: states in any form become fp32 ones by name, and load into any stage, rank count and form."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from support import SELECT, STATES, Case, assert_identical
from test_travel import UNIVERSAL, full_state, load, save

from ds_agsel import checkpoints, cli

INT8 = {**SELECT, "state_dtype": "int8"}
TAG = "global_step4"
NEEDS_LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (ds-agsel[lowbit])"
)
# What saves, and what it is loaded into.
CASES = [
    pytest.param(
        Case(model="net", stage=1, offload="cpu", section=INT8),
        Case(model="net", stage=3, offload="cpu"),
        marks=NEEDS_LIBRARY,
    ),
    pytest.param(
        Case(stage=3, offload="cpu", dtype="bf16", section={**INT8, "master_weights": "split"}),
        Case(stage=2, dtype="bf16", section=INT8),
        marks=NEEDS_LIBRARY,
    ),
    pytest.param(Case(section={**SELECT, "state_dtype": "bf16"}), Case(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "other"), CASES, ids=["stage 1 to 3", "stage 3 to 2", "bf16"])
def test_lean_states_become_fp32_by_name(workers, tmp_path, case, other):
    saved = full_state(workers(2).run(save, case, tmp_path))
    folder = tmp_path / "universal"
    assert cli.main(["universal", str(tmp_path / TAG), str(folder / "made"), "--workers", "1"]) == 0
    assert checkpoints.problems(folder / "made") == [] and (folder / "latest_universal").read_text() == "made"
    assert sorted(path.name for path in folder.iterdir()) == ["latest_universal", "made"]
    for kind in STATES[1:]:
        for name, expected in saved[kind].items():
            made = torch.load(folder / "made" / "zero" / name / f"{kind}.pt")
            made = made["param"] if isinstance(made, dict) else made
            assert made.dtype == torch.float32 and torch.equal(made.view(expected.shape), expected)
    (run,) = workers(1).run(load, other.but(config=UNIVERSAL), folder)
    loaded = full_state([run["loaded"]])
    exact = {"masters", "steps", "counts", "plan"} | ({*STATES[1:]} if other.section == SELECT else set())
    assert_identical({key: saved[key] for key in exact}, {key: loaded[key] for key in exact})
    for kind in STATES[1:]:
        for name, old in saved[kind].items():
            assert (loaded[kind][name] - old).norm() <= 0.03 * old.norm()


class RunsCode:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._folder),)


def test_what_cannot_be_converted_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "tag").mkdir()
    assert cli.main(["universal", str(tmp_path / "tag"), str(tmp_path / "made")]) == 2
    assert "can't be converted: no " in capsys.readouterr().err
    (tmp_path / "tag" / "one_optim_states.pt").write_bytes(b"")
    torch.save({"optimizer_state_dict": {"base_optimizer_state": {"state": {}}, "single_partition_of_fp32_groups": []}},
               tmp_path / "tag" / "one_optim_states.pt")  # fmt: skip
    checkpoints.seal(tmp_path / "tag")
    assert cli.main(["universal", str(tmp_path / "tag"), str(tmp_path / "made")]) == 2
    assert "ds_to_universal stopped" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tag"]
    torch.save({"module": RunsCode(tmp_path / "ran")}, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    checkpoints.seal(tmp_path / "tag")
    assert cli.main(["universal", str(tmp_path / "tag"), str(tmp_path / "made")]) == 2
    assert "mp_rank_00_model_states.pt holds " in capsys.readouterr().err and not (tmp_path / "ran").exists()
    Path(tmp_path, "made").mkdir()
    assert cli.main(["universal", str(tmp_path / "tag"), str(tmp_path / "made")]) == 2
    assert "exists. Name a new folder" in capsys.readouterr().err
    assert cli.main(["universal", str(tmp_path / "tag"), str(tmp_path / "other"), "--workers", "0"]) == 2
