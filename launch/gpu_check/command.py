"""Check a GPU, in at most 25 minutes, without a network: does it work, what does it take, how fast is it.

    make gpu-check                    # on the accelerator there is
    make gpu-check DEVICE=cpu         # the same parts, tiny, on the processor: does the check itself work?

Each part runs in a process of its own with a time limit, the most informative first, and the next goes on whatever
becomes of it. Everything is in one folder: report.md, a JSON file and a log for each part, traces. docs/gpu.md says how
to read them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.console import outlive_closed_pipes
from .parts import CARD, DRY, TOTAL_SECONDS, parts
from .report import report
from .runner import Result, run

SOME_FAILED = 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("accelerator", "cpu"), default="accelerator", help="cpu: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="default: %(default)s/<time>")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument(
        "--minutes", type=float, default=TOTAL_SECONDS / 60, help="for all parts (default: %(default)g)"
    )
    return parser.parse_args(arguments)


def machine(device: str) -> dict[str, Any]:
    """Return the facts that the numbers depend on. Leaves the device alone: a part's process may be the first on it."""
    from importlib import metadata

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "device": device}
    for package in ("torch", "deepspeed", "transformers", "ds_agsel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0; 1 if a part failed or ran out of time."""
    outlive_closed_pipes()
    wanted = parse(arguments)
    is_dry = wanted.device == "cpu"
    if is_dry:
        os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    folder = (wanted.output / time.strftime("%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True)
    facts = machine(wanted.device)
    planned = [part for part in parts(DRY if is_dry else CARD, is_dry, folder) if _is_wanted(part.name, wanted.only)]
    results = [Result(part) for part in planned]
    deadline = time.monotonic() + 60 * wanted.minutes
    for index, part in enumerate(planned):
        left = deadline - time.monotonic()
        if left > 10:
            print(f"gpu-check: {part.name}: {part.about} (at most {min(left, part.limit_seconds):.0f} s)", flush=True)
            results[index] = run(part, folder, "dry" if is_dry else "card", min(left, part.limit_seconds))
            print(f"gpu-check: {part.name}: {results[index].outcome} after {results[index].seconds:.0f} s", flush=True)
        (folder / "report.md").write_text(report(results, facts), encoding="utf-8")
    print(f"gpu-check: {folder / 'report.md'}")
    return 0 if all(result.outcome == "ok" for result in results) else SOME_FAILED


def _is_wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or name in only


if __name__ == "__main__":
    sys.exit(main())
