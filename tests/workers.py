"""Process groups for tests that need DeepSpeed: one gloo rank a process, kept from test to test, killed as one.

A test asks ``workers(2).run(function, *args)`` and gets what ``function`` returned on each rank. Functions are
passed by name, so they stand at the top level of a module. A server process imports torch, DeepSpeed and ds_agsel
once and forks the ranks, so that a fresh group costs some tenths of a second. A group whose rank failed, died or hung
is killed, since its other ranks may wait in a collective for ever.
"""

from __future__ import annotations

import array
import atexit
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
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# On a disk with direct I/O, as a tmpfs has not. A folder in it for each process group.
NVME = os.environ.get("DS_AGSEL_TEST_NVME", os.path.join(tempfile.gettempdir(), "ds_agsel_nvme"))
REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_SECONDS = 600  # DeepSpeed's first build of its Adam takes minutes
JOB_TIMEOUT_SECONDS = {False: 120, True: 900}  # on a CUDA device the first jobs wait for nvcc
GRACE_SECONDS = 5  # for the other ranks, once one has failed
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "sim": "simccl"}
# What nearly every job imports; DeepSpeed imports the last three at the first `initialize`, with half of torch.compile.
PRELOADED = (
    "support", "ds_agsel.entry.initialize", "transformers.models.llama.modeling_llama",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
)  # fmt: skip


class WorkerError(AssertionError):
    """A rank raised, died or did not answer in time."""


_servers: dict[str, Server] = {}


def extensions(accelerator: str) -> dict[str, str]:
    """Where ops are built: DeepSpeed compiles those of one name otherwise where there is a CUDA device."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder is None or accelerator == "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    return {"TORCH_EXTENSIONS_DIR": f"{folder.rstrip(os.sep)}-cpu"}


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """The parent's side of a process that has loaded what the ranks on ``accelerator`` need, and forks them."""

    def __init__(self, accelerator: str):
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cuda" if accelerator == "cuda" else "cpu",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **extensions(accelerator),
            # DeepSpeed's builds call the ninja they find first, and another version's build is not reused.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        self.output = Path(tempfile.mkdtemp(prefix="ds_agsel_workers_"), "server.log")
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), accelerator],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self.ranks: set[int] = set()
        self._socket = ours
        self._answers = Connection(os.dup(ours.fileno()))

    def fork(self, environment: dict[str, str], log: Path, connection: socket.socket) -> int:
        """The process id of a new rank that serves ``connection``, its output appended to ``log``."""
        file = array.array("i", [connection.fileno()])
        self._socket.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, file)])
        process = self._ask("fork", environment, str(log))
        self.ranks.add(process)
        return process

    def kill(self, ranks: Iterable[int]) -> None:
        """End these ranks, and what they have started, and wait for the end."""
        self.ranks.difference_update(ranks)
        if self.process.poll() is None:
            self._socket.send(b"-")
            self._ask("kill", list(ranks))

    def _ask(self, *request: Any) -> Any:
        try:
            self._answers.send(request)
            if not wait([self._answers], START_TIMEOUT_SECONDS):
                raise WorkerError(f"the server said nothing for {START_TIMEOUT_SECONDS} s")
            return self._answers.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(f"the server died: {error}\n{self.output.read_text(errors='replace')[-6000:]}") from None

    def stop(self) -> None:
        """End the server, and every rank with it."""
        self._answers.close()
        self._socket.close()  # which it sees
        self.process.wait()
        shutil.rmtree(self.output.parent, ignore_errors=True)


def processes() -> list[int]:
    """The process ids of this process's servers and of their ranks that live."""
    return [process for started in _servers.values() for process in (started.process.pid, *started.ranks)]


def server(accelerator: str) -> Server:
    """This process's server for ``accelerator``, started when first used."""
    if accelerator not in _servers:
        _servers[accelerator] = Server(accelerator)
        atexit.register(_servers[accelerator].stop)
    return _servers[accelerator]


class Workers:
    """``world_size`` processes, started when first used, on the ``accelerator`` "cpu", "cuda" or "sim": that of
    tests/simulator, whose seed and budget a job sets by `simulator.simulated`."""

    def __init__(self, world_size: int, directory: Path, accelerator: str = "cpu"):
        self.world_size = world_size
        self.accelerator = accelerator
        self._directory = directory
        self._processes: list[int] = []
        self._port = 0
        self._connections: list[Connection] = []

    def run(self, function: Callable, *args: Any, timeout_seconds: float | None = None, **kwargs: Any) -> list[Any]:
        """What ``function(*args, **kwargs)`` returned on each rank, in rank order.

        Raises: WorkerError with the traceback and the last output of each rank that failed or did not answer.
        """
        if timeout_seconds is None:
            timeout_seconds = JOB_TIMEOUT_SECONDS[self.accelerator == "cuda"]
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
        if self._processes:
            server(self.accelerator).kill(self._processes)
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
        self._port = free_port()
        for rank, log in enumerate(self._logs()):
            log.touch()
            ours, theirs = socket.socketpair()
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
            }
            self._processes.append(server(self.accelerator).fork(environment, log, theirs))
            theirs.close()
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
            for connection in [each for each in pending if each in ready]:
                rank = pending.pop(connection)
                try:
                    ok, results[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, results[rank] = False, "the process died"
                if not ok:
                    failures[rank] = results[rank]
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not failures and not pending:
            return results
        for rank in pending.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank], signal.SIGUSR1)  # its stack goes to its log
            failures[rank] = f"no answer within {timeout_seconds} s, or after another rank failed"
        if pending:
            time.sleep(1)  # for the stacks to be written
        self.stop()
        report = [f"{what} failed on {len(failures)} of {self.world_size} ranks"]
        for rank, failure in sorted(failures.items()):
            output = self._logs()[rank].read_bytes()[log_offsets[rank] :].decode(errors="replace")
            report.append(f"--- rank {rank}\n{failure}\n--- rank {rank}, end of output\n{output[-6000:]}")
        raise WorkerError("\n".join(report))


# ------------------------------------------------------------------ in the server and in the ranks


def _load(accelerator: str) -> None:
    """Import what a rank needs, whatever its job, and load the operators that DeepSpeed compiles."""
    import cpuinfo
    import torch
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
    from deepspeed.utils import numa

    # Both start a program that answers the same each time: for each CPU Adam, and for each gradient bucket of ZeRO-3
    # (cpu_accelerator.py:79, by `device_count`).
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    numa.get_numa_cores = functools.cache(numa.get_numa_cores)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch.set_num_threads(1)
    # DeepSpeed writes whole parameters into debug messages that nobody sees: thousands of copies from the device.
    torch.set_printoptions(threshold=1, edgeitems=1)
    CPUAdamBuilder().load()
    if accelerator != "cuda":
        from deepspeed.comm.torch import build_shm_op

        cpuinfo.get_cpu_info()
        FusedAdamBuilder().load()
        build_shm_op()
    if accelerator == "sim":
        from simulator import simulated

        simulated()


def _serve(control: socket.socket, accelerator: str) -> None:
    """Fork ranks and end them, as asked, until the test session goes away."""
    if accelerator != "cuda":  # which no process survives that is forked from one that has looked at it
        _load(accelerator)
        gc.collect()
        gc.freeze()
    requests = Connection(os.dup(control.fileno()))
    ranks: set[int] = set()
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 1)
        try:
            action, *arguments = requests.recv() if message else ("end",)
        except EOFError:
            action = "end"
        if action == "fork":
            process = os.fork()
            if process == 0:
                requests.close()
                control.close()
                _be_rank(Connection(files[0]), accelerator, *arguments)
                os._exit(0)
            os.close(files[0])
            ranks.add(process)
            requests.send(process)
        else:
            gone = ranks if action == "end" else set(arguments[0])
            for process in gone:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # compilers too
            for process in gone:
                os.waitpid(process, 0)
            if action == "end":
                return
            ranks -= gone
            requests.send(None)


def _be_rank(connection: Connection, accelerator: str, environment: dict[str, str], log: str) -> None:
    """Join the process group and run jobs until the connection ends."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        import deepspeed

        _load(accelerator)
        deepspeed.init_distributed(BACKENDS[accelerator])
        answer: tuple[bool, Any] = (True, None)
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    while True:
        try:
            sys.path[:] = connection.recv()
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            module, name, args, kwargs = pickle.loads(job)
            function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
        del answer
        gc.collect()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
