"""The command ``ds-agsel``: a report of runs, a run as it goes. Imports neither torch nor deepspeed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_agsel.errors import AgselError, DataError
from ds_agsel.report.runs import Run, read_run

EXTRA = "pip install 'ds-agsel[report]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 where something was asked for that can't be had."""
    parser = argparse.ArgumentParser(prog="ds-agsel", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_report(commands.add_parser("report", help="a page of one or several runs"))
    _add_watch(commands.add_parser("watch", help="a run in the terminal, as it goes"))
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except AgselError as error:
        print(f"ds-agsel: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("matplotlib", "jinja2", "rich", "numpy"):
            raise
        print(f"ds-agsel: this command needs {error.name}. Get it by {EXTRA}.", file=sys.stderr)
        return 2
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, help="HTML file; not given: report.html in the first run's folder")
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from ds_agsel.report.page import write_report

    runs = [read_run(folder, name) for folder, name in zip(options.runs, _names(options.runs), strict=True)]
    _tell_problems(runs)
    output = options.output or options.runs[0] / "report.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = write_report(runs, output)
    except OSError as error:
        message = f"--output={output} can't be written: {error.strerror}. Give a file in another folder."
        raise DataError(message) from None
    print(f"{written[0]} ({len(written) - 1} charts in {written[1].parent if len(written) > 1 else '-'})")


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--interval", type=_positive, default=2.0, metavar="SECONDS", help="between looks (2)")
    parser.add_argument("--once", action="store_true", help="show it as it is now and leave")
    parser.set_defaults(command=_watch)


def _watch(options: argparse.Namespace) -> None:
    from ds_agsel.report.watch import watch

    watch(options.run, interval_seconds=options.interval, once=options.once)


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name, with those above it where two are alike."""
    depth = 1
    parts = [folder.resolve().parts for folder in folders]
    while len({part[-depth:] for part in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _tell_problems(runs: Sequence[Run]) -> None:
    for run in runs:
        for problem in run.problems:
            print(f"ds-agsel: could not read {problem}", file=sys.stderr)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
