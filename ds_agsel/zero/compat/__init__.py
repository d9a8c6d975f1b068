"""The one place that touches what DeepSpeed does not document, with the versions it is known to work on.

`stage12.py` and `stage3.py` override public-looking methods of DeepSpeed's ZeRO optimizers; what those methods read
and write is listed here, so that a release that moved something is met by `require_known_deepspeed` with a sentence
instead of by wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state, link_hp_params
from packaging.version import Version
from pydantic import ValidationError

from ds_agsel.errors import ConfigError

# 0.19.7 and older have no compact gradient partitions, and other offload events, under these names.
KNOWN_VERSIONS = ("0.19.8",)

# What a ZeRO-1/2 optimizer keeps per param group (stage_1_and_2.py, __init__ and
# initialize_gradient_partitioning_data_structures): lists indexed by group, dicts keyed by group.
GROUP_LISTS = (
    "bit16_groups",
    "bit16_groups_flat",
    "parallel_partitioned_bit16_groups",
    "single_partition_of_fp32_groups",
    "params_in_partition",
    "params_not_in_partition",
    "first_offset",
    "partition_size",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "round_robin_bit16_indices",
    "round_robin_bit16_meta",
    "round_robin_bit16_padding",
    "round_robin_bit16_offsets",
)
OFFLOAD_GROUP_LISTS = ("param_buffer_of_bit16_for_cpu_offload_groups",)
GROUP_DICTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grad_start_offset",
    "grad_partition_insertion_offset",
)
OTHER_ATTRIBUTES = (
    "param_id",
    "params_already_reduced",
    "ready_for_gradients",
    "micro_step_id",
    "ipg_buckets",
    "reduce_bucket_size",
    "partition_gradients",
    "cpu_offload",
    "cpu_offload_pin_memory",
    "check_grad_overflow",
)
OFFLOAD_ATTRIBUTES = (
    "norm_for_param_grads",
    "accumulated_grads_in_cpu",
    "grad_position",
    "offload_gradient_dict",
    "temp_grad_buffer_for_gpu_offload",
    "_offload_accumulated_param_ids",
)
METHODS = (
    "process_gradients",
    "setup_buckets",
    "reduce_ready_partitions_and_remove_grads",
    "reduce_ipg_grads",
    "independent_gradient_partition_epilogue",
    "copy_grads_in_partition",
    "set_norm_for_param_grad_in_gpu",
    "update_offload_overflow_tracker_for_param_grad",
    "async_inplace_copy_grad_to_fp32_buffer_from_gpu",
    "async_accumulate_grad_in_cpu_via_gpu",
    "allreduce_bucket",
    "gradient_reduction_w_predivide",
    "has_overflow",
    "step",
    "_optimizer_step",
    "_lazy_init_hp_params_optimizer_state",
    "_link_all_hp_params",
    "_get_offload_gradient_dict",
    "_use_compact_grad_partition_buffer",
    "_get_compact_grad_partition_slice",
    "_restore_cpu_offload_grad_to_gpu",
    "_get_preflattened_grad_partition",
    "refresh_fp32_params",
    "update_lp_params",
)


# What a ZeRO-3 optimizer keeps per sub-group (stage3.py, _create_fp16_partitions_with_defragmentation and
# _create_fp32_partitions): lists indexed by sub-group, dicts keyed by it.
SUB_GROUP_LISTS = (
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp16_partitioned_groups_flat_numel",
    "fp16_partitioned_groups_flat_id",
    "fp32_partitioned_groups_flat",
    "groups_padding",
    "sub_group_process_groups",
    "sub_group_partition_counts",
)
SUB_GROUP_DICTS = ("averaged_gradients", "sub_group_to_group_id")
STAGE3_PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"
STAGE3_ATTRIBUTES = (
    "grad_position",
    "micro_step_id",
    "ipg_buckets",
    "reduce_bucket_size",
    "communication_data_type",
    "gradient_accumulation_dtype",
    "master_weights_and_grads_dtype",
    "grad_partitions_flat_buffer",
    "persistent_parameters",
    "parameter_offload",
    "offload_optimizer",
    "offload_optimizer_pin_memory",
    "offload_param",
    "swap_optimizer",
    "optimizer_swapper",
    "parameter_offload",
    "dp_process_group",
    "reduce_and_partition_stream",
    f"{STAGE3_PRIVATE}param_id_to_grad_partition",
)
STAGE3_OFFLOAD_ATTRIBUTES = ("subgroup_to_device", "norm_for_param_grads")
STAGE3_METHODS = (
    "reduce_ready_partitions_and_remove_grads",
    "partition_grads",
    "independent_gradient_partition_epilogue",
    "has_overflow",
    "step",
    "_get_norm_groups",
    "_prepare_sub_group",
    "_optimizer_step",
    "refresh_fp32_params",
    "_release_sub_group",
    "_restore_from_bit16_weights",
    "_offload_grad_partition_at_boundary",
    "_get_param_partition_rank",
    "_get_param_partition_world_size",
    "_partition_all_parameters",
    "get_full_hp_param",
    "set_full_hp_param",
    "get_fp32_grad_for_param",
    "set_fp32_grad_for_param",
    "get_local_fp32_param",
    "set_local_hp_param",
    "get_local_fp32_grad_for_param",
    "set_local_grad_for_param",
    "update_fp32_grad_for_param_vectorized",
    "get_hp_param_device",
    f"{STAGE3_PRIVATE}reduce_and_partition_ipg_grads",
)


def require_known_deepspeed(optimizer: ZeROOptimizer) -> None:
    """Raise ConfigError unless ``optimizer`` has all that this package relies on."""
    methods: tuple[str, ...]
    attributes: tuple[str, ...]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        stage, methods, attributes = "3", STAGE3_METHODS, SUB_GROUP_LISTS + SUB_GROUP_DICTS + STAGE3_ATTRIBUTES
        if getattr(optimizer, "offload_optimizer", False):
            attributes += STAGE3_OFFLOAD_ATTRIBUTES
    else:
        stage, methods, attributes = "1/2", METHODS, GROUP_LISTS + GROUP_DICTS + OTHER_ATTRIBUTES
        if getattr(optimizer, "cpu_offload", False):
            attributes += OFFLOAD_GROUP_LISTS + OFFLOAD_ATTRIBUTES
    missing = [name for name in methods if not hasattr(type(optimizer), name)]
    missing += [name for name in attributes if not hasattr(optimizer, name)]
    if missing:
        raise ConfigError(
            f"deepspeed=={deepspeed.__version__} has no {', '.join(missing)} in its ZeRO-{stage} optimizer, which "
            f"ds_agsel relies on. Known to work: {', '.join(KNOWN_VERSIONS)}; "
            f"install one of them: pip install 'deepspeed=={KNOWN_VERSIONS[-1]}'."
        )


def is_known() -> bool:
    """Whether the installed DeepSpeed is a release that this package was tested with."""
    return Version(deepspeed.__version__).base_version in KNOWN_VERSIONS


@contextmanager
def only_groups(optimizer: DeepSpeedZeroOptimizer, indices: Sequence[int]) -> Iterator[None]:
    """Show ``optimizer`` only the param groups ``indices``, so that its own loops pass the others by.

    Inside, group i is what was group ``indices[i]``; what DeepSpeed stores under a group's key in one of
    `GROUP_DICTS` is filed under the old key on the way out, also after an exception. The dict objects
    themselves stay, because ``_hp_mapping`` of every parameter holds them (utils/tensor_fragment.py).
    """
    base = optimizer.optimizer
    all_base_groups = base.param_groups
    if list(indices) == list(range(len(all_base_groups))):
        yield
        return
    names = GROUP_LISTS + (OFFLOAD_GROUP_LISTS if optimizer.cpu_offload else ())
    lists = {name: getattr(optimizer, name) for name in names}
    dicts = {name: getattr(optimizer, name) for name in GROUP_DICTS}
    for name, values in lists.items():
        setattr(optimizer, name, [values[index] for index in indices])
    for name, by_group in dicts.items():
        shown = {new: by_group[old] for new, old in enumerate(indices) if old in by_group}
        setattr(optimizer, name, shown)
    base.param_groups = [all_base_groups[index] for index in indices]
    try:
        yield
    finally:
        base.param_groups = all_base_groups
        for name, by_group in dicts.items():
            shown = getattr(optimizer, name)
            by_group.update({indices[new]: value for new, value in shown.items()})
            setattr(optimizer, name, by_group)
        for name, values in lists.items():
            setattr(optimizer, name, values)


@contextmanager
def only_sub_groups(optimizer: DeepSpeedZeroOptimizer_Stage3, indices: Sequence[int]) -> Iterator[None]:
    """`only_groups` for ZeRO-3: inside, sub-group i is what was sub-group ``indices[i]``. Param groups stay."""
    lists = {name: getattr(optimizer, name) for name in SUB_GROUP_LISTS}
    names = SUB_GROUP_DICTS + (("subgroup_to_device",) if optimizer.offload_optimizer else ())
    dicts = {name: getattr(optimizer, name) for name in names}
    for name, values in lists.items():
        setattr(optimizer, name, [values[index] for index in indices])
    for name, by_group in dicts.items():
        setattr(optimizer, name, {new: by_group[old] for new, old in enumerate(indices) if old in by_group})
    try:
        yield
    finally:
        for name, by_group in dicts.items():
            shown = getattr(optimizer, name)
            for new, old in enumerate(indices):
                if new in shown:
                    by_group[old] = shown[new]
                else:
                    by_group.pop(old, None)
            setattr(optimizer, name, by_group)
        for name, values in lists.items():
            setattr(optimizer, name, values)


def gradient_partitions(optimizer: DeepSpeedZeroOptimizer_Stage3) -> dict[int, torch.Tensor]:
    """By parameter's ``ds_id``: where its reduced gradient is accumulated, a slice of a flat buffer."""
    return getattr(optimizer, f"{STAGE3_PRIVATE}param_id_to_grad_partition")


def reduce_buckets(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Reduce what waits in ZeRO-3's buckets and give each rank its partition. Collective."""
    for dtype in sort_dtypes(optimizer.ipg_buckets.keys()):
        getattr(optimizer, f"{STAGE3_PRIVATE}reduce_and_partition_ipg_grads")(dtype)


@contextmanager
def left_gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Inside, ZeRO-3 takes gathered ``parameters`` for partitioned, so that it neither frees nor gathers them."""
    gathered = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.AVAILABLE]
    for parameter in gathered:
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    try:
        yield
    finally:
        for parameter in gathered:
            parameter.ds_status = ZeroParamStatus.AVAILABLE


class ParameterList:
    """Stands in for ``module`` where ZeRO-3 walks its parameters three times a step to release what is still gathered
    (partitioned_param_coordinator.py:535): 2.9 ms a step of SmolLM2-135M on a CPU, 1.2 with the list."""

    def __init__(self, module: Any) -> None:
        self._named = list(module.named_parameters())
        self.ds_external_parameters = module.ds_external_parameters

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, Any]]:
        return self._named


def is_gathered(parameter: Any) -> bool:
    """Whether a ZeRO-3 parameter is whole on this rank now."""
    return parameter.ds_status is ZeroParamStatus.AVAILABLE


@contextmanager
def attribute(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``target`` for the length of the block."""
    saved = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(target, name, value)


@contextmanager
def writes_through(engine: DeepSpeedEngine, attempt: Callable[..., Any]) -> Iterator[list[Path]]:
    """Inside, ``engine.save_checkpoint`` writes each file as ``attempt(write, *args)``: its checkpoint engine's
    ``save``, and the copies of its recovery scripts, which rank 0 alone makes (engine.py:5530), beside the tag.
    Gives the tag's files that this rank wrote, when they are written."""
    writer = engine.checkpoint_engine
    written: list[Path] = []

    def save(state_dict: Any, path: str) -> None:
        attempt(writer_save, state_dict, path)
        written.append(Path(path))

    writer_save = writer.save
    with (
        attribute(writer, save=save),
        attribute(engine, _copy_recovery_script=partial(attempt, engine._copy_recovery_script)),
    ):
        yield written


@contextmanager
def loads_through(engine: DeepSpeedEngine, load: Callable[[str], Any]) -> Iterator[None]:
    """Inside, ``engine`` reads checkpoint files by ``load(path)``."""
    with attribute(engine.checkpoint_engine, load=lambda path, map_location=None: load(path)):
        yield


def can_swap() -> bool:
    """Whether DeepSpeed's asynchronous I/O op can be built here: it needs libaio's headers."""
    return AsyncIOBuilder().is_compatible(verbose=False)


@dataclass(frozen=True)
class SwapSettings:
    """What the ds_config says about NVMe: ``offload_optimizer`` and ``aio``.

    Attributes:
        new_handle: makes a handle of the asynchronous I/O op.
        threads: of a handle, among which each transfer is divided evenly.
    """

    folder: Path
    threads: int
    new_handle: Callable[[], Any]


def take_swapper(optimizer: DeepSpeedZeroOptimizer_Stage3) -> tuple[SwapSettings, dict[int, Path]]:
    """What DeepSpeed's swapper was told, and by sub-group the file with its fp32 partition, which begins it.

    From here on ``optimizer`` has no swapper, and takes its states for offloaded to the host.
    """
    swapper = optimizer.optimizer_swapper
    partitions = enumerate(optimizer.fp32_partitioned_groups_flat)
    files = {
        index: Path(swapper.swap_params_info[swapper.parameter_id(partition)].get_swap_paths()[0])
        for index, partition in partitions
        if optimizer._swappable_optimizer_subgroup(index)
    }
    aio = swapper.aio_config
    names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
    new_handle = partial(AsyncIOBuilder().load(verbose=False).aio_handle, **{name: aio[name] for name in names})
    optimizer.swap_optimizer, optimizer.optimizer_swapper = False, None
    settings = SwapSettings(Path(swapper.swap_config.nvme_path), aio["intra_op_parallelism"], new_handle)
    return settings, files


@contextmanager
def swapped_weights_follow(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[None]:
    """Inside, ZeRO-3 may load a checkpoint also where it has model weights on NVMe; they follow the master weights.

    Its load copies masters to the flat weights of every sub-group, and such a one has none (stage3.py:3578): inside,
    all of those have one buffer, and what is written there is forgotten.
    """
    flats = optimizer.fp16_partitioned_groups_flat
    swapped = [index for index, flat in enumerate(flats) if flat is None]
    numels = optimizer.fp16_partitioned_groups_flat_numel
    sink = torch.empty(max((numels[index] for index in swapped), default=0), dtype=optimizer.dtype)
    before = {index: [partition.data for partition in optimizer.fp16_partitioned_groups[index]] for index in swapped}
    for index in swapped:
        flats[index] = sink.narrow(0, 0, numels[index])
    try:
        yield
    finally:
        for index in swapped:
            flats[index] = None
            for partition, data in zip(optimizer.fp16_partitioned_groups[index], before[index], strict=True):
                partition.data = data
            optimizer._partitioned_params_swap_out(index)


def read_weights(optimizer: DeepSpeedZeroOptimizer_Stage3, sub_group: int, flat: torch.Tensor) -> None:
    """Copy the sub-group's partition of the model weights, wherever it is, to ``flat``."""
    held = optimizer.fp16_partitioned_groups_flat[sub_group]
    if held is None:
        optimizer._swap_in_sub_group_to_flat_buffer(flat, sub_group)
    else:
        flat.copy_(held)


def write_weights(parameter: Any, value: torch.Tensor) -> None:
    """Put ``value`` in the place of this rank's partition of a ZeRO-3 parameter, wherever it is."""
    if parameter.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE:
        parameter.nvme_swapper.swap_out_partitioned_params([parameter], [value.flatten()])
    else:
        parameter.ds_tensor.data.copy_(value.view(parameter.ds_tensor.shape))


def deepspeed_version() -> str:
    """The installed release."""
    return deepspeed.__version__


def zero_section_problems(section: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed itself will refuse in a ``zero_optimization`` section that has no values "auto"."""
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        return [
            f"zero_optimization.{'.'.join(map(str, found['loc']))}={found['input']!r} is refused by DeepSpeed: "
            f"{found['msg']}. See the table of ZeRO settings in its documentation."
            for found in error.errors(include_url=False)
        ]
    return []


def norm_dtype() -> torch.dtype:
    """The dtype DeepSpeed takes gradient norms in: fp64 where the accelerator has it."""
    return get_norm_dtype()


def is_coalescing(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Whether the caller is inside `engine.coalesce_grad_reduction()` (0.19.6 and newer)."""
    return getattr(optimizer, "_coalesce_grad_reduction", False)


def is_in_bucket(param: Any) -> bool:
    """Whether ZeRO-3 took the gradient of ``param`` when it came; not one that tiles add to yet (stage3.py:1588)."""
    return getattr(param, "ds_grad_is_ready", True)


def link_reordered_params(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Link every parameter to its slice of the flat buffer where `round_robin_gradients` has reordered them.

    Stock code looks for them in their old order there, unless alignment padding happens to be in the way
    (stage_1_and_2.py:834), so that `deepspeed.utils.safe_get_full_*` answers with other parameters' numbers.
    """
    for group, params in enumerate(optimizer.bit16_groups):
        offsets = dict(
            zip(map(id, optimizer.round_robin_bit16_groups[group]), optimizer.round_robin_bit16_offsets[group])
        )
        process_group = optimizer.real_dp_process_group[group]
        partition_size = int(optimizer.partition_size[group])
        link_hp_params(
            lp_param_list=params,
            flat_hp_partition=optimizer.single_partition_of_fp32_groups[group],
            gradient_dict=optimizer.averaged_gradients,
            offload_gradient_dict=optimizer.offload_gradient_dict,
            use_offload=optimizer.cpu_offload,
            param_group_index=group,
            partition_start=dist.get_rank(group=process_group) * partition_size,
            partition_size=partition_size,
            dp_group=process_group,
            param_offsets=[offsets[id(param)] for param in params],
        )


def place_in_partition(param: Any) -> tuple[int, int, int] | None:
    """(first element of ``param`` in this rank's ZeRO-1/2 partition, where it lies there, how many); None: none is."""
    mapping = param._hp_mapping
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel


def link_adam_state(optimizer: DeepSpeedZeroOptimizer, group: int) -> None:
    """Let `deepspeed.utils.safe_get_full_optimizer_state` find the Adam state of param group ``group``."""
    partition = optimizer.single_partition_of_fp32_groups[group]
    lazy_init_hp_params_optimizer_state(optimizer.bit16_groups[group], partition, optimizer.optimizer.state)


def new_adam_state(optimizer: torch.optim.Optimizer, partition: torch.Tensor) -> dict[str, Any]:
    """A state for ``partition`` as ``optimizer`` makes it at its first update: zeros, step 0."""
    return {
        "step": adam_step(optimizer, 0),
        "exp_avg": torch.zeros_like(partition, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(partition, requires_grad=False),
    }


def adam_step(
    optimizer: torch.optim.Optimizer,
    count: int,
    param_group: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> int | torch.Tensor:
    """A step count as ``optimizer`` keeps it: an int for DeepSpeed's, fp32 of no dimension for torch's.

    On the host; on ``device`` where ``param_group`` is given and torch's fused or capturable form wants it there.
    """
    if isinstance(optimizer, (DeepSpeedCPUAdam, FusedAdam)):
        return count
    on_device = param_group is not None and (param_group.get("fused") or param_group.get("capturable"))
    return torch.tensor(float(count), dtype=torch.float32, device=device if on_device else None)


def masters(optimizer: ZeROOptimizer) -> list[torch.Tensor]:
    """The fp32 partitions as DeepSpeed's loops see them now: of param groups, with ZeRO-3 of sub-groups."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def param_group_of(optimizer: ZeROOptimizer, index: int) -> dict[str, Any]:
    """The base optimizer's param group that `masters` ``[index]`` is stepped in."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        index = optimizer.sub_group_to_group_id[index]
    return optimizer.optimizer.param_groups[index]


def set_master(optimizer: ZeROOptimizer, index: int, master: torch.Tensor) -> None:
    """Let DeepSpeed step ``master`` as its partition ``index``."""
    masters(optimizer)[index] = master
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):  # which fills its groups for a step alone
        param_group_of(optimizer, index)["params"] = [master]


def replace_masters(optimizer: ZeROOptimizer, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put ``convert(master)`` in the place of each fp32 partition. Before anything is linked to it."""
    for index, master in enumerate(masters(optimizer)):
        set_master(optimizer, index, convert(master).requires_grad_(True))


@contextmanager
def masters_made_on_host() -> Iterator[None]:
    """Inside, a new ZeRO optimizer makes its fp32 partitions in host memory, also without offload.

    Its constructor puts them on ``self.device`` (stage_1_and_2.py:278, 560; stage3.py:333, 1170), the accelerator;
    there they would take 4 bytes an element of all partitions, for the short time until they are taken away.
    """

    def keep(self: ZeROOptimizer, value: Any) -> None:
        self.__dict__["device"] = value  # what the attribute is again once the property has gone

    classes = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    for cls in classes:
        cls.device = property(lambda self: "cpu", keep)
    try:
        yield
    finally:
        for cls in classes:
            del cls.device


def has_fused_adam() -> bool:
    """Whether DeepSpeed's FusedAdam can be made for this accelerator."""
    builder = get_accelerator().create_op_builder("FusedAdamBuilder")
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":  # calls itself compatible (op_builder/cpu)
        return False
    return bool(builder.is_compatible(verbose=False))


def cpu_adam_op(optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's compiled `cpu_adam` module (csrc/adam/cpu_adam.cpp), built on first use."""
    return optimizer.ds_opt_adam if isinstance(optimizer, DeepSpeedCPUAdam) else CPUAdamBuilder().load()


def new_cpu_adam_id() -> int:
    """A C++ optimizer id that no `DeepSpeedCPUAdam` of this process has (ops/adam/cpu_adam.py)."""
    identifier = DeepSpeedCPUAdam.optimizer_id
    DeepSpeedCPUAdam.optimizer_id += 1
    return identifier


def swap_class(instance: Any, subclass: type) -> None:
    """Make ``instance`` an object of ``subclass``, which must add methods and no constructor.

    The way in that leaves DeepSpeed's long constructors to DeepSpeed (DEEPSPEED.md, "Ways in").
    """
    if type(instance) not in subclass.__mro__:
        base = next(cls for cls in subclass.__mro__ if cls.__module__.startswith("deepspeed."))
        raise ConfigError(
            f"deepspeed=={deepspeed.__version__} made a {type(instance).__name__} where adagrad_select needs a "
            f"{base.__name__}. Use ZeRO stage 1, 2 or 3 with the plain DeepSpeed engine."
        )
    instance.__class__ = subclass


def whole_state_dict(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """The model's state dict on rank 0, None elsewhere; ZeRO-3's is gathered to the host layer by layer. Collective."""
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict() if engine.global_rank == 0 else None


def mark_compiled(engine: DeepSpeedEngine, compile_kwargs: Mapping[str, Any]) -> None:
    """What `DeepSpeedEngine.compile` notes down once the module is compiled (engine.py:5871, 5941)."""
    deepspeed.utils.nvtx.enable_nvtx = False
    engine._is_compiled = True
    engine._compile_mode = "model"
    engine._compile_kwargs = compile_kwargs


__all__ = [
    "DeepSpeedCPUAdam",
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "FusedAdam",
    "SwapSettings",
    "ZeROOptimizer",
    "adam_step",
    "attribute",
    "can_swap",
    "cpu_adam_op",
    "deepspeed_version",
    "gradient_partitions",
    "has_fused_adam",
    "is_coalescing",
    "is_gathered",
    "is_in_bucket",
    "is_known",
    "left_gathered",
    "link_adam_state",
    "link_reordered_params",
    "load_ds_config",
    "loads_through",
    "mark_compiled",
    "masters",
    "masters_made_on_host",
    "new_adam_state",
    "new_cpu_adam_id",
    "norm_dtype",
    "only_groups",
    "only_sub_groups",
    "param_group_of",
    "place_in_partition",
    "read_weights",
    "reduce_buckets",
    "replace_masters",
    "require_known_deepspeed",
    "set_master",
    "swap_class",
    "swapped_weights_follow",
    "take_swapper",
    "whole_state_dict",
    "write_weights",
    "writes_through",
    "zero_section_problems",
]
