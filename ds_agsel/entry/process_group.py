"""The process group and this rank's device: set up here and nowhere else, as `deepspeed.initialize` would."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.zero import compat

# Any of these tells that a launcher started this process, and may have started others.
_OF_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",  # torchrun, deepspeed, accelerate
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS",  # mpirun
    "SLURM_PROCID", "SLURM_NTASKS", "FLUX_TASK_RANK", "JSM_NAMESPACE_SIZE",  # srun, flux, jsrun
    "AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV",  # deepspeed/comm/comm.py: in_aml, in_aws_sm
)  # fmt: skip


def start(arguments: Mapping[str, Any]) -> None:
    """Start the process group as `deepspeed.initialize` will for ``arguments`` (deepspeed/__init__.py:501).

    Keeps one that is already started. A process that no launcher started is the only rank; DeepSpeed would ask
    mpi4py, which need not be installed. Then make this rank's device the current one: what is done before DeepSpeed
    does so would otherwise meet the other ranks on device 0, which NCCL refuses. Collective.
    """
    given = {name: arguments[name] for name in ("distributed_port", "dist_init_required") if name in arguments}
    if not torch.distributed.is_initialized() and not any(name in os.environ for name in _OF_LAUNCHERS):
        os.environ.update(_variables_of_one_rank(given.get("distributed_port")))
    compat.start_process_group(**given)
    _use_own_device(arguments.get("args"))


def _use_own_device(args: Any) -> None:
    """Set the device that DeepSpeed's engine will set for the caller's ``args`` (runtime/engine.py:1941)."""
    index = getattr(args, "device_rank", int(os.environ.get("LOCAL_RANK", "-1")))
    if index >= 0:
        get_accelerator().set_device(index)


def is_expected() -> bool:
    """Return whether the launcher has started other ranks, which a process group would connect."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _variables_of_one_rank(port: int | None) -> dict[str, str]:
    """Return the variables that a launcher would set for a single process; DeepSpeed's discovery sets the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port or 0))
        free = probe.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free)}
