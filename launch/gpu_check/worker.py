"""`python -m launch.gpu_check.worker PART FOLDER SIZE CASE...`: a part's cases one after the other, in this process.

A line of JSON for each goes to FOLDER/PART.jsonl as it ends, and the case that runs now is named in FOLDER/PART.now:
what was measured before a crash stays.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .parts import CARD, DRY, Size


def main(arguments: list[str]) -> int:
    """Run the cases; return 0, also where some failed."""
    part, folder, size_name, *cases = arguments
    size = DRY if size_name == "dry" else CARD
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    action = _action(part, Path(folder))
    for case in cases:
        Path(folder, f"{part}.now").write_text(case, encoding="utf-8")
        line = {"case": case, **_outcome(action, case, size)}
        with open(Path(folder, f"{part}.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    Path(folder, f"{part}.now").unlink(missing_ok=True)
    return 0


def _action(part: str, folder: Path) -> Callable[[str, Size], dict[str, Any]]:
    from . import interleaved, matrix, memory, trace, transfers

    if part == "trace":
        return lambda case, size: trace.run(case, size, folder / "traces")
    return {"matrix": matrix.run, "memory": memory.run, "time": interleaved.run, "transfers": transfers.run}[part]


def _outcome(action: Callable[[str, Size], dict[str, Any]], case: str, size: Size) -> dict[str, Any]:
    from .models import Unavailable, destroy_all

    started = time.perf_counter()
    try:
        outcome = {"outcome": "ok", **action(case, size)}
    except Unavailable as reason:
        outcome = {"outcome": "left out", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error)[:500]}"}
    destroy_all()
    return {**outcome, "wall_seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
