"""`python -m ds_agsel.zero.build_ops [nvme]`: compile DeepSpeed's kernels now, once, not inside the first run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder

from ds_agsel.zero import compat
from ds_agsel.zero.support import AIO_REMEDY

COLLECTIVES_OP, CPU_ADAM_OP, FUSED_ADAM_OP, ASYNC_IO_OP = "deepspeed_shm_comm", "cpu_adam", "fused_adam", "async_io"
_QUIET_SECONDS = 180.0  # a build that writes nothing for this long, and whose lock no process here holds, has ended
_PATIENCE_SECONDS = 2.0  # loading an op takes its lock for a moment, too
_MINUTES = "one to two minutes each on two cores"


def main(*what: str) -> None:
    """Build `cpu_adam` and `fused_adam`, and on a CPU the shared-memory collectives: minutes once, then cached.

    An accelerator that has no `fused_adam`, or none that compiles, trains with torch's AdamW instead.

    With "nvme", the asynchronous I/O op; without libaio, a line says how to install it.
    """
    if "nvme" in what:
        if AsyncIOBuilder().is_compatible(verbose=False):
            announce([ASYNC_IO_OP], print)
            AsyncIOBuilder().load(verbose=False)
        else:
            print(f"No libaio: offload to NVMe is left out, and its tests are skipped. To have it: {AIO_REMEDY}.")
        return
    on_host = get_accelerator().device_name() == "cpu"
    announce([CPU_ADAM_OP, FUSED_ADAM_OP, *([COLLECTIVES_OP] if on_host else ())], print)
    CPUAdamBuilder().load(verbose=False)
    if on_host:
        FusedAdamBuilder().load(verbose=False)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    else:
        compat.has_fused_adam()  # which compiles it, or logs why it can't


def extensions_folder() -> Path:
    """Return the folder in which torch keeps compiled ops, one folder each (`torch.utils.cpp_extension`)."""
    set_by_user = os.environ.get("TORCH_EXTENSIONS_DIR")
    if set_by_user is not None:
        return Path(set_by_user)
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory("", False))


def announce(ops: Sequence[str], say: Callable[[str], None]) -> None:
    """Wait until no other process is building any of ``ops``; then say which are about to be compiled here.

    For one process per machine; the others wait inside torch. A killed build leaves its file ``lock``, for which torch
    waits for ever. A lock that no process here has open, in a folder in which nothing was written for three
    minutes, is removed. ``say`` prints each removal, what is waited for, how long compiling takes and where the result
    is kept.
    """
    folder = extensions_folder()
    for name in ops:
        _wait_for_build(folder / name / "lock", say)
    missing = [name for name in ops if not any((folder / name).glob(f"{name}*.so"))]
    if missing:
        say(
            f"DeepSpeed compiles {', '.join(missing)} now: {_MINUTES}, once. They are kept in {folder}; "
            "`python -m ds_agsel.zero.build_ops` compiles them beforehand."
        )


def _wait_for_build(lock: Path, say: Callable[[str], None]) -> None:
    began, told = time.monotonic(), False
    while lock.exists():
        holder = _holder_of(lock)
        if holder is None and _seconds_without_writes(lock.parent) > _QUIET_SECONDS:
            lock.unlink(missing_ok=True)
            say(f"removed {lock}, left by a build that was stopped: no process has it open. The op is built anew.")
            return
        if not told and time.monotonic() - began > _PATIENCE_SECONDS:
            told = True
            say(_waiting(lock, holder))
        time.sleep(0.2)


def _waiting(lock: Path, holder: int | None) -> str:
    if holder is not None:
        return f"waiting for process {holder}, which compiles {lock.parent.name} ({_MINUTES}); it holds {lock}"
    return (
        f"waiting for {lock}, which no process here has open. It is removed when nothing was written beside it for "
        f"{_QUIET_SECONDS:.0f} s; if you know that nobody compiles, remove it now."
    )


def _holder_of(lock: Path) -> int | None:
    """Return the process that has ``lock`` open, of those that can be inspected; None if no such process is found."""
    wanted = str(lock.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry.path) == wanted for entry in os.scandir(descriptors)):
                return int(descriptors.parent.name)
        except OSError:  # another user's, or gone
            continue
    return None


def _seconds_without_writes(folder: Path) -> float:
    newest = 0.0
    for path in folder.iterdir():
        try:
            newest = max(newest, path.stat().st_mtime)
        except OSError:  # removed since it was listed
            continue
    return time.time() - newest


if __name__ == "__main__":
    main(*sys.argv[1:])
