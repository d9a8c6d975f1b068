"""The GPU check's plan, its way through parts that fail, hang or die, and what it reads out of a trace."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.gpu_check import runner
from launch.gpu_check.parts import CARD, DRY, Part, parts
from launch.gpu_check.report import report
from launch.gpu_check.trace import merged, overlap, read, total


def test_the_most_informative_parts_come_first_and_the_dry_run_leaves_none_of_ours_out(tmp_path: Path) -> None:
    on_card = list(parts(CARD, False, tmp_path))
    assert [part.name for part in on_card[:4]] == ["build", "matrix", "tests", "memory"]
    dry = list(parts(DRY, True, tmp_path))
    assert [part.name for part in dry] == [part.name for part in on_card if part.name not in ("build", "smollm2")]
    assert all(bool(part.cases) != bool(part.command) for part in on_card)
    assert len(on_card[1].cases) == 27 and len(on_card[3].cases) == 10


def test_a_trace_says_what_was_launched_waited_for_and_hidden() -> None:
    def event(kind: str, name: str, start: float, seconds: float) -> dict[str, object]:
        return {"cat": kind, "name": name, "ts": start, "dur": seconds}

    found = read(
        [
            event("kernel", "gemm", 0, 10e6), event("kernel", "adam", 5e6, 10e6),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 10e6, 10e6),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 20e6, 5e6),
            event("gpu_memcpy", "Memcpy DtoD", 0, 50e6),
            event("cuda_runtime", "cudaLaunchKernel", 0, 1), event("cuda_driver", "cuLaunchKernelEx", 0, 1),
            event("cuda_runtime", "cudaStreamSynchronize", 0, 1), event("cuda_runtime", "cudaHostAlloc", 0, 1),
            event("cuda_runtime", "cudaMemcpyAsync", 0, 1), event("cpu_op", "aten::mm", 0, 1),
        ],
        steps=2,
    )  # fmt: skip
    counts = [found[name] for name in ("launches", "host_waits", "copies", "page_locked_allocations")]
    assert counts == [1, 0.5, 0.5, 0.5]
    assert (found["kernel_seconds"], found["copy_seconds"]) == (7.5, 7.5)
    assert found["copies_overlapped_fraction"] == 5 / 15
    assert read([], 1)["copies_overlapped_fraction"] is None


def test_spans_are_joined_and_cut() -> None:
    assert merged([(3, 5), (0, 1), (4, 6), (6, 7)]) == [(0, 1), (3, 7)]
    assert total([(0, 1), (3, 7)]) == 5
    assert overlap([(0, 4)], [(1, 2), (3, 9)]) == 2


def test_the_check_goes_on_after_what_fails_and_ends_what_hangs(tmp_path: Path) -> None:
    def command(name: str, code: str) -> runner.Result:
        return runner.run(Part(name, "", 60, command=(sys.executable, "-c", code)), tmp_path, "dry", limit)

    limit = 60.0
    assert command("well", "print(1)").outcome == "ok"
    assert command("ill", "raise SystemExit(3)").outcome == "failed"
    limit, started = 1.0, time.monotonic()
    assert command("hangs", "import time; time.sleep(60)").outcome == "out of time"
    assert time.monotonic() - started < 30
    assert "SystemExit" not in (tmp_path / "well.log").read_text()


def test_a_case_that_kills_its_worker_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    """A worker stands in for the real one: it dies at "b"."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "worker.py").write_text(
        "import json, os, sys\n"
        "part, folder, size, *cases = sys.argv[1:]\n"
        "for case in cases:\n"
        "    open(f'{folder}/{part}.now', 'w').write(case)\n"
        "    if case == 'b':\n"
        "        os._exit(9)\n"
        "    open(f'{folder}/{part}.jsonl', 'a').write(json.dumps({'case': case, 'outcome': 'ok'}) + '\\n')\n"
    )
    monkeypatch.setattr(runner, "__package__", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = runner.run(Part("part", "about", 60, cases=("a", "b", "c")), tmp_path, "dry", 60)
    assert result.outcome == "failed"
    assert {case["case"]: case["outcome"] for case in result.cases} == {"a": "ok", "b": "failed", "c": "ok"}
    assert "code 9" in result.cases[-1]["reason"]
    page = report([result], {"device": "none"})
    assert "| part | about | failed |" in page and "- device: none" in page
