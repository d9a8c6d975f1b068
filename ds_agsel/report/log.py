"""The selection's logs of a training run, for `ds-agsel report`, `ds-agsel watch` and the replay policy."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import distributed

from ds_agsel.files import write_atomically
from ds_agsel.report.matrices import MATRICES_FILE, as_json
from ds_agsel.report.runs import BLOCKS_FILE, METRICS_FILE, SELECTION_FILE, SUMMARY_FILE
from ds_agsel.selection import Record

logger = logging.getLogger("ds_agsel")

__all__ = ["BLOCKS_FILE", "METRICS_FILE", "SELECTION_FILE", "SUMMARY_FILE", "JsonLines", "SelectionLog"]


class JsonLines:
    """A log of one JSON object a line, each flushed as it is written.

    A resumed run keeps the first ``keep_lines``, those written before its checkpoint, and goes on after them.
    """

    def __init__(self, path: Path, keep_lines: int = 0) -> None:
        kept = path.read_text(encoding="utf-8").splitlines()[:keep_lines] if keep_lines else []
        self.path = path
        self.num_lines = len(kept)
        if keep_lines:
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a" if keep_lines else "w", encoding="utf-8")  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.num_lines += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SelectionLog:
    """``blocks.json`` and ``selection.jsonl`` of a run, in ``folder``. For one rank, rank 0; not collective.

    With ``sparse_grad`` there is ``sparse_grad.json`` too, written whenever entries were chosen.

    Args:
        folder: made where it does not exist. A selection.jsonl in it keeps the lines of the steps that
            the selection has applied (a resumed run's); steps of its history that the file lacks are written
            without traffic, and any others are dropped.
        optimizer: of an engine that `ds_agsel.initialize` returned; it has the selection.
    """

    def __init__(self, folder: Path, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._selection = optimizer.selection
        self._folder = folder
        self._matrices: Any = None  # as they were last written
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / BLOCKS_FILE, json.dumps(self._blocks(), indent=1) + "\n")
        path = folder / SELECTION_FILE
        known = _lines_by_step(path)
        applied, recorded = self._selection.num_steps, {record.step: record for record in self._selection.history}
        kept = {step: line for step, line in known.items() if 0 <= step < applied}
        kept = {step: json.dumps(_line(record)) for step, record in recorded.items()} | kept
        write_atomically(path, "".join(f"{kept[step]}\n" for step in sorted(kept)))
        self._num_written = applied
        self._log = JsonLines(path, len(kept))

    def update(self) -> None:
        """Append the steps that were applied since the last call; without any, do nothing.

        Call it at least once in `selection.TAIL_STEPS` steps: earlier ones are no longer known, and a warning says so.
        """
        self._update_matrices()
        new = self._selection.num_steps - self._num_written
        if new == 0:
            return
        samples = {} if self._selection.samples is None else {s.step: s for s in self._selection.samples.history}
        records, traffic = self._selection.history[-new:], {entry.step: entry for entry in self._selection.traffic}
        if len(records) < new:
            logger.warning("adagrad_select: %s lacks %d steps, written too late.", self._log.path, new - len(records))
        for record in records:
            line = _line(record)
            line["explore_rate"] = self._selection.policy.explore_probability(record.step)
            line["traffic"] = {key: value for key, value in asdict(traffic[record.step]).items() if key != "step"}
            line["state_bytes"] = self._optimizer.state_bytes()
            line["accelerator_state_bytes"] = self._optimizer.accelerator_state_bytes()
            if record.step in samples:
                line["samples"] = samples[record.step].as_json()
            self._log.write(line)
        self._num_written += new

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def _update_matrices(self) -> None:
        sparse = self._selection.sparse
        if sparse is not None and sparse.captured is not None and sparse.matrices != self._matrices:
            write_atomically(self._folder / MATRICES_FILE, json.dumps(as_json(sparse.matrices)) + "\n")
            self._matrices = dict(sparse.matrices)

    def _blocks(self) -> dict[str, Any]:
        blocks = self._selection.blocks
        return {
            "policy": self._selection.config.policy,
            "select_percent": self._selection.config.select_percent,
            "ranks": distributed.get_world_size() if distributed.is_initialized() else 1,
            "total_numel": sum(block.numel for block in blocks),
            "blocks": [{"index": block.index, "name": block.name, "numel": block.numel} for block in blocks],
        }


def _line(record: Record) -> dict[str, Any]:
    return {"step": record.step, "phase": record.phase, "blocks": list(record.blocks)}


def _lines_by_step(path: Path) -> dict[int, str]:
    """Return the lines of an earlier selection.jsonl by step, without damaged ones."""
    lines: dict[int, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                lines[record["step"]] = line
    return lines
