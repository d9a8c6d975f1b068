"""DeepSpeed's shared memory for collectives on a CPU does not outlive the processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from workers import free_port

SCRIPT = """
import torch
from pathlib import Path
import deepspeed
from ds_agsel.zero.compat import start_process_group

def names():
    torch.distributed.barrier()
    return sorted(path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_{port}_*"))

deepspeed.init_distributed("gloo")
before = names()
start_process_group()
after, ones = names(), torch.ones(4)
deepspeed.comm.all_reduce(ones)
print(len(before), len(after), ones.tolist())
"""


def test_the_shared_memory_of_collectives_has_no_name_once_all_ranks_have_it() -> None:
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.replace("{port}", str(port))],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert all(words.splitlines()[-1] == "2 0 [2.0, 2.0, 2.0, 2.0]" for words in said), said
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
