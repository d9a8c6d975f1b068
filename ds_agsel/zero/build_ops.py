"""`python -m ds_agsel.zero.build_ops`: compile DeepSpeed's CPU kernels now, once, instead of inside the first run."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder

from ds_agsel.zero.support import AIO_REMEDY


def main() -> None:
    """Build `cpu_adam`, on a CPU `fused_adam` and the shared-memory collectives, and where libaio is found what NVMe
    needs: minutes once, then cached."""
    CPUAdamBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        FusedAdamBuilder().load(verbose=False)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    if AsyncIOBuilder().is_compatible(verbose=False):
        AsyncIOBuilder().load(verbose=False)
    else:
        print(f"No libaio: offload to NVMe is left out, and its tests are skipped. To have it: {AIO_REMEDY}.")


if __name__ == "__main__":
    main()
