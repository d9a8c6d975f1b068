"""The command ``ds-agsel fit``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_agsel import starting_config
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.sizes import read_bytes

if TYPE_CHECKING:
    from torch import nn

    from ds_agsel.estimate.fit import Found
    from ds_agsel.estimate.setting import Unit
    from ds_agsel.estimate.shapes import ModelShape


def add_options(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument(
        "--card", default="auto", help="rtx4090, h100, ... (a wrong name lists them), auto: this machine's, or "
        "numbers: memory, dense bf16 TFLOPS, GB/s, PCIe, as in 24GiB,165TFLOPS,1008GB/s,PCIe4x16",
    )  # fmt: skip
    parser.add_argument("--host-memory", default="auto", metavar="SIZE", help="32GiB; auto: this machine's")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="cards in one machine (1)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="tokens of a row (2048)")
    parser.add_argument("--micro-batch-size", default="auto", metavar="N", help="rows in one forward (auto: searched)")
    parser.add_argument("--tokens-per-step", type=int, default=16384, metavar="N", help="on all ranks together (16384)")
    parser.add_argument("--nvme", type=Path, metavar="FOLDER", help="for states on NVMe; what is free there is enough?")
    parser.add_argument("--no-nvme", action="store_true", help="leave NVMe out")
    parser.add_argument("--host-gb-per-second", type=float, default=50.0, metavar="X", help="memory of the host (50)")
    parser.add_argument("--nvme-gb-per-second", type=float, default=6.0, metavar="X", help="the drive (6)")
    parser.add_argument("--show", type=int, default=6, metavar="N", help="settings to print (6)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the first setting's ds_config")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def answer(options: argparse.Namespace) -> tuple[str, int]:
    """Return what to print, and the exit status: 0 if a setting fits, else 1. Writes --output.

    Raises ConfigError for options that make no sense.
    """
    from ds_agsel.estimate.models import require_model

    require_model(options.model)
    micro_batch = _check(options)
    from ds_agsel.estimate.fit_text import as_text

    found = find(options, micro_batch)
    words = {"model": options.model} | ({"output": str(options.output)} if options.output else {})
    text = as_text(found, options.show, words)
    if found.best is None:
        return text, 1
    if options.output:
        content = json.dumps(found.best.ds_config, indent=2) + "\n"
        starting_config.write(options.output, content, overwrite=options.overwrite)
    return text, 0


def find(options: argparse.Namespace, micro_batch: int | None) -> Found:
    """Return the search's result for checked options."""
    from ds_agsel.estimate.activations import activations_of
    from ds_agsel.estimate.cards import find_card
    from ds_agsel.estimate.fit import Job, Machine, search
    from ds_agsel.estimate.models import build_on_meta
    from ds_agsel.estimate.prediction import Rates
    from ds_agsel.estimate.setting import AXES
    from ds_agsel.estimate.shapes import shape_of

    rates = Rates(find_card(options.card), options.host_gb_per_second * 1e9, options.nvme_gb_per_second * 1e9)
    machine = Machine(rates, options.ranks, _host_bytes(options.host_memory), **_nvme(options.nvme))
    model = build_on_meta(options.model)
    shape = shape_of(options.model, model)
    axes: dict[str, Any] = dict(AXES)
    if options.no_nvme:
        axes = {name: [value for value in values if value != "nvme"] for name, values in axes.items()}
    job = Job(options.sequence_length, options.tokens_per_step, micro_batch)
    others = other_units(options.model, model)
    return search(shape, activations_of(model), machine, job, axes, others)


def other_units(name: str, model: nn.Module) -> dict[Unit, ModelShape]:
    """Return the shape of ``model`` in units of single matrices and, if it has matrices for it, with `sparse_grad`."""
    from ds_agsel.estimate.shapes import shape_of
    from ds_agsel.sparse_grad_section import SparseGradConfig

    shapes: dict[Unit, ModelShape] = {"module": shape_of(name, model, granularity="module")}
    with contextlib.suppress(ConfigError):
        shapes["entries"] = shape_of(name, model, sparse_grad=SparseGradConfig.model_validate({}))
    return shapes


def _check(options: argparse.Namespace) -> int | None:
    """Raise ConfigError for a number that can't be; return the micro-batch, None if it is to be searched."""
    for name in ("ranks", "sequence_length", "tokens_per_step", "show", "host_gb_per_second", "nvme_gb_per_second"):
        value = getattr(options, name)
        if not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={value:g} is not above 0. Leave it out for its default.")
    if options.nvme and options.no_nvme:
        raise ConfigError("--nvme and --no-nvme exclude each other. Drop one.")
    if options.micro_batch_size == "auto":
        return None
    if not options.micro_batch_size.isdecimal() or int(options.micro_batch_size) < 1:
        raise ConfigError(
            f"--micro-batch-size={options.micro_batch_size} is not a number of rows. Use auto, or 1 or more."
        )
    return int(options.micro_batch_size)


def _host_bytes(text: str) -> int:
    if text.lower() == "auto":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return read_bytes(text, "--host-memory")


def _nvme(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError(f"--nvme={folder} is not a folder. Give one on the drive that is to hold the states.")
    return {"nvme_bytes": shutil.disk_usage(folder).free, "nvme_path": str(folder)}
