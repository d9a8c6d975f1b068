"""Process groups for tests that need DeepSpeed: one gloo rank a process, kept from test to test, killed as one.

A test asks ``workers(2).run(function, *args)`` and gets what ``function`` returned on each rank. Functions are
passed by name, so they stand at the top level of a module. The start of torch and DeepSpeed (6 s) is paid once a
group; a group whose rank failed, died or hung is killed, since its other ranks may wait in a collective for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# On a disk with direct I/O, as a tmpfs has not. A folder in it for each process group.
NVME = os.environ.get("DS_AGSEL_TEST_NVME", os.path.join(tempfile.gettempdir(), "ds_agsel_nvme"))
REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_SECONDS = 600  # DeepSpeed's first build of its Adam takes minutes
GRACE_SECONDS = 5  # for the other ranks, once one has failed


class WorkerError(AssertionError):
    """A rank raised, died or did not answer in time."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Workers:
    """``world_size`` processes, started when first used, on the ``accelerator`` "cpu", "cuda" or "sim": that of
    tests/simulator, whose seed and budget a job sets by `simulator.simulated`."""

    def __init__(self, world_size: int, directory: Path, accelerator: str = "cpu"):
        self.world_size = world_size
        self.accelerator = accelerator
        self._directory = directory
        self._processes: list[subprocess.Popen] = []
        self._port = 0
        self._connections: list[Connection] = []

    def run(self, function: Callable, *args: Any, timeout_seconds: float = 120, **kwargs: Any) -> list[Any]:
        """What ``function(*args, **kwargs)`` returned on each rank, in rank order.

        Raises: WorkerError with the traceback and the last output of each rank that failed or did not answer.
        """
        if not self._processes:
            self._start()
        offsets = [log.stat().st_size for log in self._logs()]
        job = pickle.dumps((function.__module__, function.__qualname__, args, kwargs))
        for connection in self._connections:
            connection.send(sys.path)  # first, as unpickling the job imports what its arguments come from
            connection.send_bytes(job)
        return self._collect(f"{function.__module__}.{function.__qualname__}", timeout_seconds, offsets)

    def stop(self) -> None:
        """Kill every rank and whatever it started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        # DeepSpeed's shared memory (csrc/cpu/comm/shm.cpp), 64 MiB a group, outlives those who are killed.
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self._port}_*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(Path(NVME, str(self._port)), ignore_errors=True)  # what plain DeepSpeed has swapped out

    def _logs(self) -> list[Path]:
        name = f"{self.accelerator}{self.world_size}"
        return [self._directory / f"{name}_rank{rank}.log" for rank in range(self.world_size)]

    def _start(self) -> None:
        port = self._port = _free_port()
        for rank, log in enumerate(self._logs()):
            ours, theirs = socket.socketpair()
            environment = {
                **os.environ,
                "DS_ACCELERATOR": "cuda" if self.accelerator == "cuda" else "cpu",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                # DeepSpeed's builds call the ninja they find first, and another version's build is not reused.
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            }
            with log.open("ab") as output:
                command = [sys.executable, __file__, str(theirs.fileno()), str(os.getpid()), self.accelerator]
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            theirs.close()
            self._processes.append(process)
            self._connections.append(Connection(ours.detach()))
        self._collect("start", START_TIMEOUT_SECONDS, [0] * self.world_size)

    def _collect(self, what: str, timeout_seconds: float, log_offsets: list[int]) -> list[Any]:
        """Each rank's answer to the job sent last; kills the group where one is missing or an error."""
        deadline = time.monotonic() + timeout_seconds
        pending = dict(zip(self._connections, range(self.world_size), strict=True))
        results: list[Any] = [None] * self.world_size
        failures: dict[int, str] = {}
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    ok, results[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, results[rank] = False, "the process died"
                if not ok:
                    failures[rank] = results[rank]
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not failures and not pending:
            return results
        for rank in pending.values():
            self._processes[rank].send_signal(signal.SIGUSR1)  # its stack goes to its log
            failures[rank] = f"no answer within {timeout_seconds} s, or after another rank failed"
        if pending:
            time.sleep(1)
        self.stop()
        report = [f"{what} failed on {len(failures)} of {self.world_size} ranks"]
        for rank, failure in sorted(failures.items()):
            output = self._logs()[rank].read_bytes()[log_offsets[rank] :].decode(errors="replace")
            report.append(f"--- rank {rank}\n{failure}\n--- rank {rank}, end of output\n{output[-6000:]}")
        raise WorkerError("\n".join(report))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)  # compilers too


def _serve(connection: Connection, parent: int, accelerator: str) -> None:
    """Be one rank: run jobs until the test session goes away."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()

    import cpuinfo

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # DeepSpeedCPUAdam asks each time, for 1 s
    import deepspeed
    import torch
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    torch.set_num_threads(1)
    CPUAdamBuilder().load()
    if accelerator != "cuda":
        FusedAdamBuilder().load()
    if accelerator == "sim":
        from simulator import simulated

        simulated()
    deepspeed.init_distributed({"cpu": "gloo", "cuda": "nccl", "sim": "simccl"}[accelerator])
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            sys.path[:] = connection.recv()
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            module, name, args, kwargs = pickle.loads(job)
            function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
        del answer
        gc.collect()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
