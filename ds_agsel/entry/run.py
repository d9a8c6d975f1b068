"""``python -m ds_agsel.run script.py ...``: `ds_agsel.install`, then the script as ``python script.py ...`` runs it.

Also behind a launcher: ``deepspeed --module ds_agsel.run script.py ...``, ``torchrun -m ds_agsel.run script.py ...``,
``accelerate launch -m ds_agsel.run script.py ...``.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn

import ds_agsel

USAGE = "usage: python -m ds_agsel.run script.py [arguments of the script]"


def main(arguments: list[str]) -> None:
    """Run the script that ``arguments`` name, with `deepspeed.initialize` ours. Exits with 2 where there is none."""
    # The deepspeed launcher puts --local_rank=N before the script's name under --module, behind it otherwise.
    of_launcher = []
    while arguments and arguments[0].startswith("--local_rank"):
        of_launcher.append(arguments.pop(0))
    if not arguments or arguments[0].startswith("-"):
        _refuse("no script was named")
    script, *rest = arguments
    if not os.path.isfile(script):
        _refuse(f"{script!r} is not a file")
    sys.argv = [script, *of_launcher, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    ds_agsel.install()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            ds_agsel.uninstall()  # it says itself what went wrong: no word at exit about what was not selected
        raise


def _refuse(what: str) -> NoReturn:
    print(f"ds_agsel.run: {what}. {USAGE}", file=sys.stderr)
    raise SystemExit(2)
