"""``python -m ds_agsel.run script.py ...``: `ds_agsel.install`, then the script as ``python script.py ...`` runs it.

Also behind a launcher: ``deepspeed --module ds_agsel.run script.py ...``, ``torchrun -m ds_agsel.run script.py ...``,
``accelerate launch -m ds_agsel.run script.py ...``; and ``python -m ds_agsel.run -m module ...`` for a module.
Processes that the script starts honour the section as well (`ds_agsel.entry.children`).
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn

import ds_agsel
from ds_agsel.entry import children

USAGE = "usage: python -m ds_agsel.run [--select-percent K] (script.py | -m module) [arguments of the script]"


def main(arguments: list[str]) -> None:
    """Run the script or module that ``arguments`` name, with `deepspeed.initialize` ours.

    ``--select-percent K`` adds the section ``{"select_percent": K}`` to ds_configs that have none: for scripts that
    build theirs in code. Exits with 2 where no script is named, or one that does not exist.
    """
    arguments = list(arguments)
    # The deepspeed launcher puts --local_rank=N before the script's name under --module, behind it otherwise.
    of_launcher: list[str] = []
    select_percent: float | None = None
    while arguments and arguments[0].startswith("-") and arguments[0] != "-m":
        word = arguments.pop(0)
        if word.startswith("--local_rank"):
            of_launcher.append(word)
        elif word.split("=")[0] == "--select-percent":
            text = word.split("=", 1)[1] if "=" in word else (arguments.pop(0) if arguments else "")
            select_percent = _percent(text)
        else:
            _refuse("no script was named")
    is_module = bool(arguments) and arguments[0] == "-m"
    if is_module:
        arguments.pop(0)
    if not arguments:
        _refuse("no module was named" if is_module else "no script was named")
    name, *rest = arguments
    if not is_module and not os.path.isfile(name):
        _refuse(f"{name!r} is not a file")
    sys.argv = [name, *of_launcher, *rest]
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(name))
    children.reach_children(select_percent)
    ds_agsel.install()
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            ds_agsel.uninstall()  # the script reports its own failure: no message at exit about a missing selection
        raise


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        _refuse(f"--select-percent={text!r} is outside (0, 100]")
    return value


def _refuse(what: str) -> NoReturn:
    print(f"ds_agsel.run: {what}. {USAGE}", file=sys.stderr)
    raise SystemExit(2)
