"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

from ds_agsel.config import SECTION, did_you_mean, quoted
from ds_agsel.errors import ConfigError
from ds_agsel.policies.base import Policy, PolicyContext

PolicyClass = TypeVar("PolicyClass", bound=type[Policy])

_POLICIES: dict[str, type[Policy]] = {}


@overload
def register(name: str) -> Callable[[PolicyClass], PolicyClass]: ...


@overload
def register(name: str, cls: PolicyClass) -> PolicyClass: ...


def register(name: str, cls: type[Policy] | None = None) -> object:
    """Let ``adagrad_select.policy`` name a class: ``@register("mine")``, or ``register("mine", Mine)``.

    Sets ``cls.name``. A class that is defined again (a notebook cell run twice) replaces the old one.
    Raises ConfigError if another class has the name, TypeError if the class is not a Policy.
    """
    if cls is None:
        return lambda decorated: register(name, decorated)
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise TypeError(f'{cls!r} can\'t be registered as policy "{name}": it is not a subclass of Policy.')
    if not isinstance(name, str) or not name:
        raise TypeError(f"A policy's name is a non-empty string, not {name!r}.")
    known = _POLICIES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            f'Policy "{name}" is already {known.__module__}.{known.__qualname__}. Register {cls.__qualname__}'
            " under another name."
        )
    cls.name = name
    _POLICIES[name] = cls
    return cls


def policy_class(name: str) -> type[Policy]:
    """Return the class registered under ``name``. Raises ConfigError with the nearest name and all names."""
    if name not in _POLICIES:
        raise ConfigError(
            f'{SECTION}.policy="{name}" is unknown.{did_you_mean(name, _POLICIES)} Policies:'
            f" {quoted(sorted(_POLICIES))}; register your own with ds_agsel.policies.register before training"
            " starts."
        )
    return _POLICIES[name]


def create(context: PolicyContext) -> Policy:
    """Return the policy that ``context.config`` names. Raises ConfigError for an unknown name or a bad setting."""
    return policy_class(context.config.policy).create(context)
