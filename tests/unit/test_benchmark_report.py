"""The benchmark's report of samples that are made up."""

from __future__ import annotations

from typing import Any

from launch.benchmarking.report import summarize, table


def sample(optimizer: float, **more: Any) -> dict[str, Any]:
    return {
        "seconds": {"forward": 1.0, "backward": 2.0, "optimizer": optimizer},
        "cpu_seconds": 3.0,
        "updated_numel": 25,
        "accelerator_gradient_bytes": 50,
        "host_gradient_bytes": 0,
        "state_bytes": 200,
        **more,
    }


def test_ratios_are_taken_within_a_round_and_their_median_is_given() -> None:
    samples = {
        "plain": {number: sample(slow, peak_bytes={"resident": 2**20}) for number, slow in enumerate((1, 3, 7))},
        "all": {number: sample(slow, peak_bytes={"resident": 2**21}) for number, slow in enumerate((2, 1.5, 7))},
    }
    rows = summarize(samples, [60, 40], tokens=12)
    assert rows["all"]["optimizer_to_plain"]["median"] == 1  # of 2, 0.5 and 1
    assert rows["all"]["share"]["mean"] == 0.25 and rows["plain"]["tokens_per_second"] == 2
    assert rows["all"]["peak_bytes"] == {"resident": 2**21}
    assert "no peak" not in table("mode", rows)


def test_rows_that_share_a_process_have_no_peak() -> None:
    rows = summarize({row: {0: sample(1)} for row in ("plain", "all")}, [100], tokens=1)
    assert all(row["peak_bytes"] is None for row in rows.values())
    title, head, *lines = table("mode", rows).strip().splitlines()
    assert title.endswith("; no peak of rows that share a process")
    column = head.index("peak")
    assert all(line[column : column + len("peak")].strip() == "-" for line in lines if not line.startswith("---"))
