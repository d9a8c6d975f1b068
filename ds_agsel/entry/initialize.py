"""`initialize`: `deepspeed.initialize` that honours the ``adagrad_select`` section of the ds_config."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import deepspeed

from ds_agsel.config import SECTION, SelectionConfig, find_section, parse_section
from ds_agsel.ds_config import DsConfig
from ds_agsel.entry import agreement, announce, callers, children, epochs, process_group, stock
from ds_agsel.entry.arguments import for_deepspeed, read_config
from ds_agsel.entry.preparation import Preparation, prepare, user_optimizer
from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.selection import Selection
from ds_agsel.zero import compat, plain_loads, rows, step_device, window
from ds_agsel.zero.adapters import restrict
from ds_agsel.zero.carriers import Carriers
from ds_agsel.zero.engine import SelectiveEngine
from ds_agsel.zero.step_device import StepDevice
from ds_agsel.zero.support import refuse_unsupported

logger = logging.getLogger("ds_agsel")

_SIGNATURE = inspect.signature(deepspeed.initialize)  # taken now: a later wrapper may have another signature


def initialize(*args: Any, support_data: Any = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`: its arguments, its result (engine, optimizer, dataloader, scheduler).

    ``support_data``: rows that the rows of a batch are scored against, with `adagrad_select.gast.support` "data": a
    map-style dataset or a list, put together by ``collate_fn`` or torch's default.

    Where the ds_config (``config``, ``config_params`` or ``args.deepspeed_config``; dict, path or base64) has no
    ``adagrad_select`` section, or a disabled one, the call is passed on as it is. Otherwise the engine updates the
    selected blocks at each step and has a `selection` (`ds_agsel.selection.Selection`). The caller's dict, groups
    and optimizer are not edited; the optimizer's param groups go on being followed, so that a scheduler made on it
    works. Without any optimizer (a DPO reference model) the engine only evaluates, and is DeepSpeed's own.
    Raises ConfigError, before DeepSpeed makes an engine, for settings that can't work. Collective.
    """
    with stock.stock_initialize(), compat.architectures_by_number():
        number = agreement.next_call()
        call = _SIGNATURE.bind(*args, **kwargs)
        ds_config = read_config(call.arguments)
        try:
            section = None if ds_config is None else find_section(ds_config)
            if ds_config is not None and section is None:
                section = children.added_section()
            config = None if section is None else parse_section(section)
        except ConfigError as error:
            _tell_other_ranks(number, call.arguments, error)
            raise
        if ds_config is None or config is None or not config.enabled:
            agreement.post_plain(number)
            why = "is disabled" if config is not None else "is missing"
            announce.announce(f"the section {SECTION} of the ds_config {why}: DeepSpeed trains all blocks, as it is.")
            if call.arguments.get("model") is not None and _trains(call.arguments, ds_config):
                window.retire(call.arguments["model"].parameters())  # windows of our earlier engine for this model
            plain = deepspeed.initialize(*args, **kwargs)
            if config is not None and isinstance(plain[0], compat.DeepSpeedEngine):
                plain_loads.name_the_remedy(plain[0])
            return plain
        if not _trains(call.arguments, ds_config) or callers.only_evaluates():
            announce.announce("this engine has no optimizer or only evaluates, so it is left to DeepSpeed.")
            agreement.post_plain(number)
            return deepspeed.initialize(*args, **kwargs)
        return _initialize_selective(number, call.arguments, ds_config, config, support_data)


def _trains(arguments: Mapping[str, Any], ds_config: Mapping[str, Any] | None) -> bool:
    """Return whether the engine is to have an optimizer."""
    named = ds_config is not None and DsConfig.of(ds_config).has_optimizer
    return arguments.get("optimizer") is not None or named


def _initialize_selective(
    number: int, arguments: dict[str, Any], ds_config: Mapping[str, Any], config: SelectionConfig, support_data: Any
) -> tuple[Any, Any, Any, Any]:
    process_group.start(arguments)
    window.lift(arguments["model"].parameters())  # of the earlier engine, in the middle of a window
    read = DsConfig.of(ds_config)
    try:
        prepared, epoch = _prepare(arguments, read, config)
        support = rows.support(config, support_data, arguments.get("collate_fn"))
    except ConfigError as error:
        _tell_other_ranks(number, arguments, error)
        raise
    agreement.require(number, _shared_parts(prepared, arguments["model"], ds_config))
    choice = _step_device(read, prepared)
    changed = for_deepspeed(arguments, ds_config, prepared, choice)
    visits = choice is StepDevice.VISIT

    with compat.masters_made_on_host() if visits and config.keep_master == "host" else nullcontext():
        engine, optimizer, dataloader, scheduler = deepspeed.initialize(**changed)

    selection = Selection(prepared.blocks, prepared.policy, prepared.lottery, config, prepared.named)
    link = HyperparameterLink(prepared.user_groups, prepared.split.parents)
    compat.require_known_engine(engine)
    compat.swap_class(engine, SelectiveEngine)
    engine.optimizer = restrict(optimizer, selection, prepared.split.blocks, link, states_visit=visits)
    engine.selection = selection
    if config.sparse_grad is not None:
        carriers = Carriers(engine.optimizer, config.sparse_grad, prepared.targets, prepared.split.apart)
        engine.optimizer.carriers, selection.sparse = carriers, carriers.record
    engine.optimizer.window.watch(engine.module, support)
    announce.announce(announce.selection(prepared, read, choice, epoch))
    if not compat.is_known():
        known = ", ".join(compat.KNOWN_VERSIONS)
        logger.warning("ds_agsel was tested with deepspeed %s, not yet with %s.", known, deepspeed.__version__)
    return engine, engine.optimizer, dataloader, scheduler


def _prepare(
    arguments: Mapping[str, Any], ds_config: DsConfig, config: SelectionConfig
) -> tuple[Preparation, epochs.EpochLength | None]:
    model = arguments["model"]
    refuse_unsupported(ds_config, model, arguments.get("mpu"), config)
    callers.warn_of_unseen_ranks()
    callers.warn_of_replaced_optimizer(arguments.get("optimizer"))
    optimizer = user_optimizer(arguments, ds_config)
    epoch = epochs.known_length(config, ds_config, arguments.get("training_data"))
    steps = None if epoch is None else epoch.steps
    finder = epochs.EpochFinder(ds_config)
    return prepare(model, config, optimizer, arguments.get("model_parameters"), steps, finder), epoch


def _shared_parts(prepared: Preparation, model: Any, ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that must be equal on all ranks."""
    return {
        **agreement.parts(ds_config, prepared.config, model),
        "versions": {**agreement.versions(), "deepspeed": deepspeed.__version__},
        "blocks": [[block.name, list(block.parameter_names)] for block in prepared.blocks],
        "param groups": [
            {key: value for key, value in group.items() if key != "params"} for group in prepared.split.groups
        ],
        "steps_per_epoch": prepared.steps_per_epoch,
    }


def _tell_other_ranks(number: int, arguments: Mapping[str, Any], error: ConfigError) -> None:
    """Let the other ranks raise the error that this one is about to raise."""
    if process_group.is_expected():
        process_group.start(arguments)
    agreement.require(number, {}, failure=str(error))


def _step_device(ds_config: DsConfig, prepared: Preparation) -> StepDevice:
    """Return where AdamW runs and log it with the reason. Collective if it depends on the memory of all ranks."""
    choice, reason = step_device.decide(
        prepared.config.step_device,
        step_device.situation(
            ds_config,
            prepared.config,
            prepared.blocks,
            prepared.lottery.active,
            prepared.bound,
            prepared.user_optimizer is not None,
        ),
    )
    step_device.report(choice, reason)
    return choice
