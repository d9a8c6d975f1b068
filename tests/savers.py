"""Ranks that train and save after every step until they are killed, forked from a process that has loaded DeepSpeed."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import socket
import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cpuinfo
from support import Case, build, partitions, run_steps, weights

KEEP = 3


def prepare() -> None:
    """What each rank needs, loaded once: the fork server imports this module with SAVERS_SERVER set."""
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    import ds_agsel.entry.initialize  # noqa: F401

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    CPUAdamBuilder().load()
    FusedAdamBuilder().load()
    build_shm_op()


if os.environ.get("SAVERS_SERVER"):
    prepare()


@contextmanager
def ranks(case: Case, world_size: int, directory: Path) -> Iterator[Ranks]:
    """``world_size`` ranks of `resume_train_and_save`, killed at the end at the latest."""
    started = Ranks(case, world_size, directory)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def _server_environment() -> dict[str, str]:
    """For the server, which the first start starts. Its sys.path is Python's own (3.11), and it drops what it can't
    import."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return {"SAVERS_SERVER": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


class Ranks:
    """The parent's side: what the ranks say, and the means to kill one."""

    def __init__(self, case: Case, world_size: int, directory: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["savers"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes, self.connections = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (case, rank, world_size, directory, port, theirs)
            process = context.Process(target=resume_train_and_save, args=arguments, daemon=True)
            with unittest.mock.patch.dict(os.environ, _server_environment()):
                process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def next(self, rank: int, timeout_seconds: float = 120) -> tuple[str, Any] | None:
        """What ``rank`` says next; None where it has ended."""
        if not wait([self.connections[rank]], timeout_seconds):
            raise AssertionError(f"rank {rank} said nothing for {timeout_seconds} s")
        try:
            return self.connections[rank].recv()
        except (EOFError, OSError):
            return None

    def kill(self, rank: int) -> None:
        """SIGKILL, and wait for the end."""
        self.processes[rank].kill()
        self.processes[rank].join()


def resume_train_and_save(
    case: Case, rank: int, world_size: int, directory: Path, port: int, parent: Connection
) -> None:
    """Go on from the newest whole tag, if there is any, to the last step of ``case``; save after each.

    Says ("state", (step, digest of all that is there)) after loading and after each step, then ("saving", step) and
    ("saved", step) around the save; ("end", None) last.
    """
    import deepspeed
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    deepspeed.init_distributed("gloo", verbose=False)
    engine = build(case.but(seed=case.seed + 1))  # other weights: those of the checkpoint must replace them
    path, _ = engine.load_checkpoint(str(directory))
    if path is None:
        engine.destroy()
        engine = build(case)
    first = engine.global_steps
    parent.send(("state", (first, digest(engine))))
    for step in range(first, case.steps):
        run_steps(engine, case, step, step + 1)
        parent.send(("state", (step + 1, digest(engine))))
        parent.send(("saving", step + 1))
        engine.save_checkpoint(str(directory), keep=KEEP)
        parent.send(("saved", step + 1))
    parent.send(("end", None))


def digest(engine: Any) -> str:
    """sha256 of this rank's weights, masters, moments and counts, and of the selection's record."""
    selection = engine.selection
    record = [selection.history, selection.update_counts, selection.plan]
    tensors = list(weights(engine).values())
    for group in partitions(engine):
        record.append(group["step"])
        tensors += [group[key] for key in ("masters", "exp_avg", "exp_avg_sq")]
    found = hashlib.sha256(repr(record).encode())
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
