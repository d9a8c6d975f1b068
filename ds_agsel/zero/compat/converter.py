"""DeepSpeed's program that makes a universal checkpoint, run inside this process."""

from __future__ import annotations

import sys
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from ds_agsel.zero.compat.views import attribute


def convert_to_universal(source: Path, target: Path, workers: int) -> None:
    """Write the universal form of the tag ``source`` to the folder ``target``, by so many processes.

    Also writes ``latest_universal`` beside ``target``. Raises what DeepSpeed's program raises.
    """
    count = str(workers)
    words = ["--input_folder", f"{source}", "--output_folder", f"{target}"]
    words += ["--num_extract_workers", count, "--num_merge_workers", count]
    with attribute(sys, argv=["ds_to_universal", *words]):
        options = ds_to_universal.parse_arguments()
    ds_to_universal.main(options)
