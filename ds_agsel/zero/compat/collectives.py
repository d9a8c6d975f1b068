"""Start DeepSpeed's process group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator


def start_process_group(**arguments: Any) -> None:
    """Call `deepspeed.init_distributed`, which keeps a group that is there, for this accelerator. Collective.

    On a CPU with the launcher's ranks all on one machine, each rank makes 66 MiB of shared memory for collectives,
    which the others map at once and nobody removes: it outlives the processes (0.19.8, csrc/cpu/comm/shm.cpp:368).
    Here its name is removed once all have it. The memory is freed when the last of them ends, however that comes.
    """
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), **arguments)
    buffer = _shared_buffer()
    if buffer.exists():  # on each rank, or on none
        torch.distributed.barrier()
        buffer.unlink(missing_ok=True)


def _shared_buffer() -> Path:
    """Return the file of this rank's buffer, named as in csrc/cpu/comm/shm.cpp:353."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{torch.distributed.get_rank()}")
