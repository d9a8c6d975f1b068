"""The command ``ds-agsel``: find, write and check a config, train, evaluate, estimate, report and watch runs.

`report` and `watch` import neither torch nor deepspeed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ds_agsel import fit_command, launching, presets, starting_config
from ds_agsel.config import find_section, parse_section
from ds_agsel.ds_config import read_ds_config
from ds_agsel.errors import AgselError, DataError
from ds_agsel.report.rows import refused_text, uses_of_rows
from ds_agsel.report.runs import Run, read_run

EXTRA = "pip install 'ds-agsel[report]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: success; 1: `check` found problems; 2: the request can't be fulfilled.
    """
    parser = argparse.ArgumentParser(prog="ds-agsel", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_init(commands.add_parser("init", help="write a commented ds_config to begin with"))
    _add_launching(commands)
    _add_check(commands.add_parser("check", help="whether a ds_config is sound, one line for each problem"))
    _add_estimate(commands.add_parser("estimate", help="bytes per rank and traffic, from the model's config alone"))
    _add_fit(
        commands.add_parser("fit", help="settings for a model on a card, predicted; writes the best one's ds_config")
    )
    _add_universal(commands.add_parser("universal", help="make a universal checkpoint of a tag, in fp32"))
    _add_report(commands.add_parser("report", help="a page of one or several runs"))
    _add_watch(commands.add_parser("watch", help="a run in the terminal, as it goes"))
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in _LAUNCHED:
            return _replace_process(_LAUNCHED[words[0]](words[1:]))
        options = parser.parse_args(words)
        status: int | None = options.command(options)
    except AgselError as error:
        print(f"ds-agsel: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("matplotlib", "jinja2", "rich", "numpy"):
            raise
        print(f"ds-agsel: this command needs {error.name}. Get it by {EXTRA}.", file=sys.stderr)
        return 2
    return status or 0


_LAUNCHED = {"train": launching.train_command, "evaluate": launching.evaluate_command}  # with options of their own


def _add_launching(commands: Any) -> None:
    train = "fine-tune a model, through DeepSpeed's launcher, whose options are taken, too; --help lists the others"
    commands.add_parser("train", add_help=False, help=train)
    commands.add_parser("evaluate", add_help=False, help="zero-shot accuracy of a model on GSM8K, MATH or other data")


def _replace_process(command: Sequence[str]) -> int:
    """Replace this process by ``command``, which then gets the signals and sets the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], list(command))


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=Path("ds_config.json"), metavar="FILE")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO's (2)")
    parser.add_argument("--no-offload", action="store_true", help="optimizer states on the accelerator")
    parser.add_argument("--select-percent", type=_percent, default=20.0, metavar="K", help="blocks per step (20)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> None:
    content = starting_config.text(
        stage=options.stage, offload=not options.no_offload, select_percent=options.select_percent
    )
    starting_config.write(options.file, content, overwrite=options.overwrite)
    print(
        f"{options.file} is written. Next: ds-agsel check {options.file}; ds-agsel train --deepspeed_config "
        f"{options.file} --model MODEL --dataset DATA --output runs/first"
    )


_MODEL_HELP = "a model's config.json, the folder that has it, a hub name, or one known here (a wrong name lists them)"


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a ds_config")
    parser.add_argument("--model", help=f"{_MODEL_HELP}; also checks the names of its blocks")
    parser.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    ds_config = read_ds_config(options.file)
    with _stdout_is_ours():
        from ds_agsel.estimate.models import build_on_meta, require_model

        if options.model is not None:
            require_model(options.model)
        from ds_agsel.entry import listing
        from ds_agsel.entry.check import problems_of

        model = None if options.model is None else build_on_meta(options.model)
        problems = problems_of(ds_config, model)
        section = {} if problems else find_section(ds_config) or {}
        units: list[str] = []
        if model is not None and not problems:
            units = listing.lines(model, parse_section(section))
    for problem in problems:
        print(f"{options.file}: {problem}")
    if not problems:
        print(f"{options.file}: sound")
        units = presets.lines(section) + units
    for line in units:
        print(line)
    return 1 if problems else 0


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--ds-config", required=True, type=Path, metavar="FILE")
    unset = "not given: the ds_config's, or 10 20 30"
    parser.add_argument("--select-percent", type=float, nargs="+", metavar="K", help=unset)
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="accelerators (1)")
    parser.add_argument("--card", help="the card to compare with, as for fit")
    parser.add_argument("--host-memory", metavar="SIZE", help="of the machine, to compare with: 32GiB")
    parser.add_argument("--json", action="store_true", help="for programs, in bytes")
    parser.set_defaults(command=_estimate)


def _estimate(options: argparse.Namespace) -> None:
    ds_config = read_ds_config(options.ds_config)
    section = find_section(ds_config)
    config = parse_section({} if section is None else section)
    given = (10.0, 20.0, 30.0) if section is None else (config.select_percent,)
    with _stdout_is_ours():
        from ds_agsel.estimate.models import require_model

        require_model(options.model)
        from ds_agsel.estimate.cards import find_card
        from ds_agsel.estimate.setup import read_setup
        from ds_agsel.estimate.shapes import read_shape
        from ds_agsel.estimate.sizes import read_bytes
        from ds_agsel.estimate.table import as_json, as_text, estimate, in_short

        setup = read_setup(ds_config, options.ranks)
        model = read_shape(options.model, config.blocks, config.granularity, config.sparse_grad)
        result = estimate(model, setup, config, options.select_percent or given)
        card = None if options.card is None else find_card(options.card).capacity_bytes
        host = None if options.host_memory is None else read_bytes(options.host_memory, "--host-memory")
        short = in_short(result, card, host)
    print(json.dumps(as_json(result), indent=2) if options.json else f"{short}\n\n{as_text(result)}")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    fit_command.add_options(parser, _MODEL_HELP)
    parser.set_defaults(command=_fit)


def _fit(options: argparse.Namespace) -> int:
    with _stdout_is_ours():
        text, status = fit_command.answer(options)
    print(text)
    return status


@contextlib.contextmanager
def _stdout_is_ours() -> Iterator[None]:
    """Send what libraries print while they load to stderr, so that a program can read stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _add_universal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tag", type=Path, metavar="DIR/TAG", help="folder of a checkpoint that ds_agsel saved")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.set_defaults(command=_universal)


def _universal(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise DataError(f"--workers={options.workers} is not a number of processes. Use 1 or more.")
    with _stdout_is_ours():
        from ds_agsel.zero.universal import to_universal

        to_universal(options.tag, options.output, options.workers)
    print(f'{options.output} is written. Load it with "checkpoint": {{"load_universal": true}} in the ds_config.')


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
    for run in runs:
        refused = refused_text(uses_of_rows(run.choices))
        if refused:
            print(f"{run.name}: rows that blocks refused most, on rank 0\n{refused}")


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--interval", type=_positive, default=2.0, metavar="SECONDS", help="between looks (2)")
    parser.add_argument("--once", action="store_true", help="show it as it is now and leave")
    parser.set_defaults(command=_watch)


def _watch(options: argparse.Namespace) -> None:
    from ds_agsel.report.watch import watch

    watch(options.run, interval_seconds=options.interval, once=options.once)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return each folder's own name, with its parents' if two are alike."""
    depth = 1
    parts = [folder.resolve().parts for folder in folders]
    while len({part[-depth:] for part in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _tell_problems(runs: Sequence[Run]) -> None:
    for run in runs:
        for problem in run.problems:
            print(f"ds-agsel: could not read {problem}", file=sys.stderr)


def _percent(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 100]")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
