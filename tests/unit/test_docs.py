"""docs/ is what its scripts write, and the 7B config fits the card that it is for."""

from __future__ import annotations

from pathlib import Path

from launch.pages import scaling, transfers, which_setting
from launch.reproduction import command

DOCS = Path(__file__).parents[2] / "docs"


def test_scaling_is_what_its_script_writes():
    assert (DOCS / "scaling.md").read_text(encoding="utf-8") == scaling.page(), "run `make docs`"


def test_transfers_is_what_its_script_writes():
    defaults = (transfers.MODELS, transfers.PERCENTAGES)
    written = transfers.page(*defaults, transfers.BATCH, transfers.SEQUENCE)
    assert (DOCS / "transfers.md").read_text(encoding="utf-8") == written, "run `make docs`"
    assert all("simulated" in line.lower() for line in written.splitlines()[:3:2])


def test_which_setting_is_what_its_script_writes():
    assert (DOCS / "which-setting.md").read_text(encoding="utf-8") == which_setting.page(), "run `make docs`"


def test_the_cost_of_the_paper_s_experiments_is_what_its_script_writes(tmp_path: Path):
    assert command.main(["--scale", "full", "--cost", "--output", str(tmp_path / "reproduction.md")]) == 0
    written = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    assert (DOCS / "reproduction.md").read_text(encoding="utf-8") == written, "run `make docs`"


def test_a_7b_model_fits_the_24_gb_card_and_would_not_without_offload():
    estimate, activations = scaling.seven_b()
    assert 6.5e9 < estimate.model.numel < 8e9
    ours = [row for row in estimate.rows if (row.method, row.stepping) == ("ds_agsel", "host")]
    assert {(row.phase, row.which) for row in ours} == {
        (phase, which) for phase in ("exploit", "explore") for which in ("expected", "worst")
    }
    for row in ours:
        assert row.memory.accelerator.total + activations < 0.9 * scaling.CARD_BYTES
    resident = scaling.full_memory(estimate.model.user_groups, (), estimate.setup.but(offload_optimizer="none"))
    assert resident.accelerator.total > scaling.CARD_BYTES
