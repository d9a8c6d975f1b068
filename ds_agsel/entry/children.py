"""Processes that a script starts: `trl sft`, `llamafactory-cli train` and launchers train in children of their own.

``python -m ds_agsel.run`` puts a folder with a ``sitecustomize`` module first on ``PYTHONPATH``. Every Python process
that inherits it honours the ``adagrad_select`` section. Others are not touched, and nothing is installed that would
have to be removed. DeepSpeed's launcher passes ``PYTHONPATH`` on to other nodes, too (launcher/runner.py, EXPORT_ENVS).
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger("ds_agsel")

FOLDER = Path(__file__).with_name("site")
_ENGAGED = "DS_AGSEL_ENGAGED"  # a file that exists once an engine of this process or of a child has a selection
SELECT_PERCENT = "DS_AGSEL_SELECT_PERCENT"  # for ds_configs without a section


def reach_children(select_percent: float | None = None) -> None:
    """Make the processes that this one starts honour the section.

    Args:
        select_percent: the ``select_percent`` of ds_configs that have no section, here and in children; None: such
            ds_configs stay plain.
    """
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ[_ENGAGED] = os.path.join(tempfile.mkdtemp(prefix="ds_agsel_"), "engaged")
    if select_percent is not None:
        os.environ[SELECT_PERCENT] = str(select_percent)


def added_section() -> dict[str, float] | None:
    """Return the section for a ds_config without one, as ``--select-percent`` asked for it; None: none."""
    text = os.environ.get(SELECT_PERCENT)
    if text is None:
        return None
    logger.warning("adagrad_select: the ds_config has no section; --select-percent=%s adds one.", text)
    return {"select_percent": float(text)}


def note_engaged() -> None:
    """Let the process that started this one know that an engine has a selection."""
    path = os.environ.get(_ENGAGED)
    if path is not None and os.path.isdir(os.path.dirname(path)):
        Path(path).touch()


def has_engaged() -> bool:
    """Return whether an engine of a child on this node has a selection."""
    path = os.environ.get(_ENGAGED)
    return path is not None and os.path.exists(path)
