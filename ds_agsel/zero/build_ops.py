"""`python -m ds_agsel.zero.build_ops`: compile the CPU Adam kernels now, once, instead of inside the first run."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder


def main() -> None:
    """Build `cpu_adam` (1 to 3 minutes the first time, then cached), and on a CPU accelerator `fused_adam`."""
    CPUAdamBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        FusedAdamBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
