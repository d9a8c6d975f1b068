"""`python -m ds_agsel.zero.build_ops`: compile DeepSpeed's CPU kernels now, once, instead of inside the first run."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder


def main() -> None:
    """Build `cpu_adam`, and on a CPU `fused_adam` and the shared-memory collectives: minutes once, then cached."""
    CPUAdamBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        FusedAdamBuilder().load(verbose=False)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    main()
