"""`make deepspeed-suite TESTS=<DeepSpeed checkout>/tests`: DeepSpeed's unit tests, plain and through ds_agsel.

Each file runs twice: as it is, and with every eligible `deepspeed.initialize` going through ds_agsel
(`agsel_suite_shim`). The sets of passed and skipped tests must be the same, apart from what expected.csv lists, and the
number of engaged engines must be the one in engines.csv, where it has the file, and never zero. Exit codes of pytest
decide nothing. Exits with 1 where something differs, and with 0 without TESTS, after a line that says so. Standard
library only, apart from what it starts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from comparison import compare, compare_engines, not_run, read_engines, read_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Where DeepSpeed 0.19 tests what ds_agsel touches: ZeRO 1 to 3, their checkpoints, schedulers and precisions.
FILES = (
    "unit/runtime/zero/test_zero.py",
    "unit/runtime/zero/test_zero_context.py",
    "unit/runtime/zero/test_zero_grad_clip.py",
    "unit/runtime/zero/test_zero_tensor_fragment.py",
    "unit/runtime/zero/test_zero_empty_param.py",
    "unit/runtime/zero/test_zero_autocast.py",
    "unit/runtime/zero/test_offload_states.py",
    "unit/checkpoint/test_zero_optimizer.py",
    "unit/checkpoint/test_lr_scheduler.py",
    "unit/checkpoint/test_latest_checkpoint.py",
    "unit/checkpoint/test_shared_weights.py",
    "unit/checkpoint/test_tag_validation.py",
    "unit/checkpoint/test_universal_checkpoint.py",
)
Outcomes = dict[str, str]


@dataclass
class Run:
    """What a file's run left: outcomes by test id, and what became of the calls of `deepspeed.initialize`."""

    outcomes: Outcomes
    calls: collections.Counter[str]
    refusals: collections.Counter[str]


def run_file(tests: Path, file: str, log: Path, section: str | None, limit_seconds: int) -> Run:
    """Run ``file`` of the checkout's ``tests``, through ds_agsel where a ``section`` is given; output is in ``log``."""
    with tempfile.TemporaryDirectory(prefix="ds_agsel_suite_") as folder:
        counts = Path(folder) / "counts"
        counts.mkdir()
        outcomes = Path(folder) / "outcomes.jsonl"
        outcomes.touch()
        environment = {
            **os.environ,
            "DS_TEST_USE_INSTALLED_DEEPSPEED": "1",  # not the checkout's own, which has the tests alone here
            "LOCAL_SIZE": os.environ.get("LOCAL_SIZE", "2"),  # of the CPU accelerator: its number of devices
            "DS_AGSEL_SUITE_OUTCOMES": str(outcomes),
            "DS_AGSEL_SUITE_COUNTS": str(counts),
        }
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        if section is not None:
            paths.insert(0, str(HERE / "site"))
            environment["DS_AGSEL_SUITE_SITE"] = str(ROOT / "ds_agsel/entry/site/sitecustomize.py")
            environment["DS_AGSEL_SUITE_SECTION"] = section
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [
            sys.executable, "-m", "pytest", "-p", "agsel_suite_outcomes", "-p", "no:cacheprovider",
            "--rootdir", str(tests), file,
        ]  # fmt: skip
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=tests, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                output.write(f"\nstopped after {limit_seconds} s\n")
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it started and left behind, too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = [json.loads(line) for path in counts.iterdir() for line in path.read_text().splitlines()]
        return Run(
            dict(json.loads(line) for line in outcomes.read_text().splitlines()),
            collections.Counter(line["kind"] for line in lines),
            collections.Counter(line["why"] for line in lines if line["kind"] == "refused"),
        )


def chosen_files(tests: Path, files: list[str]) -> list[str]:
    """Return ``files``, or those of `FILES` that the checkout has. Exits where it lacks one that was asked for."""
    missing = [file for file in files if not (tests / file).is_file()]
    if missing:
        sys.exit(f"deepspeed-suite: {tests} has no {', '.join(missing)}; name files relative to it.")
    chosen = files or [file for file in FILES if (tests / file).is_file()]
    if not chosen:
        sys.exit(f"deepspeed-suite: {tests} has none of the known files; TESTS is the folder `tests` of a checkout.")
    return chosen


def warn_of_another_version(tests: Path) -> None:
    """Say so where the checkout's version is not the installed one, whose tests these are then not."""
    file, installed = tests.parent / "version.txt", importlib.metadata.version("deepspeed")
    if file.is_file() and file.read_text().strip() != installed:
        print(f"deepspeed-suite: the checkout is of {file.read_text().strip()}, deepspeed {installed} is installed.")


def counted(outcomes: Outcomes) -> str:
    return ", ".join(
        f"{number} {outcome}" for outcome, number in sorted(collections.Counter(outcomes.values()).items())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="folder `tests` of a DeepSpeed checkout of the installed version")
    parser.add_argument("--section", default='{"policy": "all"}', help="the section that is added, as JSON")
    parser.add_argument("--output", type=Path, default=Path("runs/deepspeed_suite"), help="folder of logs and outcomes")
    parser.add_argument("--limit-seconds", type=int, default=3600, help="of a file's run")
    parser.add_argument("--expected", type=Path, default=HERE / "expected.csv", help="table of known differences")
    parser.add_argument("--engines", type=Path, default=HERE / "engines.csv", help="table of engaged engines")
    parser.add_argument("files", nargs="*", help="relative to the folder; default: what ds_agsel touches")
    arguments = parser.parse_args()
    if arguments.tests is None:
        print("deepspeed-suite: skipped, no checkout: make deepspeed-suite TESTS=<DeepSpeed checkout>/tests")
        return 0
    tests = arguments.tests.resolve()
    policy = json.loads(arguments.section).get("policy", "adagrad_select")
    arguments.output.mkdir(parents=True, exist_ok=True)
    warn_of_another_version(tests)
    plain, selective, engaged = {}, {}, {}
    for file in chosen_files(tests, arguments.files):
        name = file.replace("/", ".")
        log = arguments.output / f"{name}.plain.log"
        before = run_file(tests, file, log, None, arguments.limit_seconds)
        log = arguments.output / f"{name}.{policy}.log"
        after = run_file(tests, file, log, arguments.section, arguments.limit_seconds)
        plain.update(before.outcomes)
        selective.update(after.outcomes)
        engaged[file] = after.calls["engaged"]
        calls = ", ".join(f"{after.calls[kind]} {kind}" for kind in ("engaged", "plain", "refused"))
        print(f"{file}: plain {counted(before.outcomes)}; through ds_agsel {counted(after.outcomes)}; engines {calls}")
        for why, number in after.refusals.most_common():
            print(f"  refused {number} times: {why}")
    found = {"policy": policy, "plain": plain, "selective": selective, "engaged": engaged}
    (arguments.output / f"{policy}.json").write_text(json.dumps(found, indent=1) + "\n")
    problems = compare(plain, selective, read_table(arguments.expected), policy)
    problems += not_run(list(engaged), plain)
    problems += compare_engines(engaged, read_engines(arguments.engines), policy)
    print("\n".join(problems) if problems else "deepspeed-suite: as expected")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
