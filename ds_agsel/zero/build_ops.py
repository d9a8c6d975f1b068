"""`python -m ds_agsel.zero.build_ops [nvme]`: compile DeepSpeed's kernels now, once, not inside the first run."""

from __future__ import annotations

import sys

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder

from ds_agsel.zero.support import AIO_REMEDY


def main(*what: str) -> None:
    """Build `cpu_adam`, and on a CPU `fused_adam` and the shared-memory collectives: minutes once, then cached.

    With "nvme", the asynchronous I/O op; where there is no libaio, a line says how to have it.
    """
    if "nvme" in what:
        if AsyncIOBuilder().is_compatible(verbose=False):
            AsyncIOBuilder().load(verbose=False)
        else:
            print(f"No libaio: offload to NVMe is left out, and its tests are skipped. To have it: {AIO_REMEDY}.")
        return
    CPUAdamBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        FusedAdamBuilder().load(verbose=False)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
