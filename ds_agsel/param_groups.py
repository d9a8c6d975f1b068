"""Param groups: one per block and set of hyperparameters, each following the group of the user it came from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_agsel.blocks import numel
from ds_agsel.errors import ConfigError, TrainingError

ParamGroup = dict[str, Any]


def as_param_groups(model_parameters: Any, model: nn.Module) -> list[ParamGroup]:
    """`deepspeed.initialize`'s ``model_parameters`` (None, parameters, or dicts) as a list of new dicts."""
    if model_parameters is None:
        model_parameters = model.parameters()
    items = list(model_parameters)
    if items and isinstance(items[0], Mapping):
        return [{**group, "params": _as_list(group["params"])} for group in items]
    return [{"params": items}]


def _as_list(parameters: Any) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)


@dataclass(frozen=True)
class SplitGroups:
    """Param groups split by block: ``groups[i]`` belongs to ``blocks[i]`` and came from the parent ``parents[i]``.

    ``apart`` has the indices of the groups that hold parameters which had to stand apart, and no others.
    """

    groups: list[ParamGroup]
    blocks: tuple[int, ...]
    parents: tuple[int, ...]
    apart: tuple[int, ...] = ()


def split_param_groups(
    param_groups: Sequence[ParamGroup], block_of: Mapping[nn.Parameter, int], apart: Collection[nn.Parameter] = ()
) -> SplitGroups:
    """Divide each group by block, in the groups' order and, within one, in the blocks'; ``apart`` in groups of its own.

    Parameters keep their order. Frozen and empty ones, which are in no block, are left out, as DeepSpeed does
    (runtime/utils.py, is_optimized_parameter). Raises ConfigError for a trainable parameter that has no block.
    """
    groups: list[ParamGroup] = []
    blocks: list[int] = []
    parents: list[int] = []
    apart_groups: list[int] = []
    alone = set(apart)
    for parent, group in enumerate(param_groups):
        members: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if not parameter.requires_grad or numel(parameter) == 0:
                continue
            if parameter not in block_of:
                raise ConfigError(
                    f"param group {parent} holds a trainable parameter of shape {tuple(parameter.shape)} that is not "
                    "in the model. Give deepspeed the optimizer or model_parameters of the same model."
                )
            members.setdefault((block_of[parameter], parameter in alone), []).append(parameter)
        for block, stands_apart in sorted(members):
            if stands_apart:
                apart_groups.append(len(groups))
            groups.append({**group, "params": members[block, stands_apart]})
            blocks.append(block)
            parents.append(parent)
    return SplitGroups(groups, tuple(blocks), tuple(parents), tuple(apart_groups))


def with_partners(
    param_groups: Iterable[ParamGroup], partner_of: Mapping[nn.Parameter, nn.Parameter]
) -> list[ParamGroup]:
    """Return the groups with each parameter's partner right behind it, where it has one."""
    groups = []
    for group in param_groups:
        partners = set(partner_of.values())
        parameters = [parameter for parameter in group["params"] if parameter not in partners]
        pairs = ((parameter, partner_of.get(parameter)) for parameter in parameters)
        groups.append({**group, "params": [member for pair in pairs for member in pair if member is not None]})
    return groups


class HyperparameterLink:
    """Copies changes of the user's groups (by a scheduler or by hand) to the groups split from them.

    Only a change is copied, so that a scheduler working on the split groups themselves is left alone. The link
    lives outside ``param_groups``, which are pickled into checkpoints.
    """

    def __init__(self, parents: Sequence[ParamGroup], parent_of: Sequence[int]) -> None:
        self._parents = parents
        self._parent_of = tuple(parent_of)
        self._seen = [self._hyperparameters(group) for group in parents]

    @staticmethod
    def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in group.items() if key != "params"}

    def push(self, children: Iterable[ParamGroup]) -> None:
        """Copy what has changed in the parents since the last call to their children.

        Raises TrainingError if a group was added to the parents: its parameters are in no partition of ZeRO's.
        """
        children = list(children)
        added = len(self._parents) - len(self._seen) or len(children) - len(self._parent_of)
        if added:
            raise TrainingError(
                f"the optimizer has {added} param groups more than at ds_agsel.initialize. ZeRO can't take up a group "
                "later: give the optimizer all param groups before, and keep one still with lr=0."
            )
        changed: dict[int, dict[str, Any]] = {}
        for index, parent in enumerate(self._parents):
            now = self._hyperparameters(parent)
            if now != self._seen[index]:
                seen = self._seen[index]
                changed[index] = {key: value for key, value in now.items() if seen.get(key, ...) != value}
                self._seen[index] = now
        if changed:
            for parent_index, child in zip(self._parent_of, children):
                child.update(changed.get(parent_index, {}))

    def pull(self, children: Iterable[ParamGroup]) -> None:
        """Give the parents what a checkpoint put into the children, so that a scheduler goes on from there."""
        for parent_index, child in zip(self._parent_of, children):
            parent = self._parents[parent_index]
            parent.update({key: child[key] for key in self._hyperparameters(parent) if key in child})
        self._seen = [self._hyperparameters(parent) for parent in self._parents]
