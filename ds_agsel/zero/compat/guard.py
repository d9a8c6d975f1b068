"""Refuse a DeepSpeed that has moved names this package relies on, before anything is trained.

[Note: What the guard holds] Three things, each an error that names what moved and the release to install:

- `overrides` marks each method of ours that replaces one of DeepSpeed's. When the class is made, the stock
  method must be there and ours must take every call that it takes: a method that DeepSpeed renamed would otherwise be
  an override that nobody calls. A method of ours that is not marked must have no stock one behind it.
- `names.py` lists every other stock name that this package reads, sets or calls, for stages 1 and 2, for stage 3 and
  for the engine; `require_known_deepspeed` and `require_known_engine` hold an object to it.
- tests/unit/test_guard.py holds those lists to the code.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FunctionType
from typing import Any, TypeVar

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.version import Version

from ds_agsel.zero.compat import older
from ds_agsel.zero.compat.names import ENGINE, ZERO3, ZERO12, StockNames
from ds_agsel.zero.compat.versions import installed, is_known, refusal

Method = TypeVar("Method", bound=Callable[..., Any])
STOCK_CLASSES = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, DeepSpeedEngine)
_MARK = "_overrides_deepspeed"
ATTRIBUTE = "attribute"  # in `StockNames.before`: an older release has the name as an attribute


def overrides(method: Method) -> Method:
    """Mark ``method`` as one that DeepSpeed calls instead of its own. `ChecksOverrides` has it checked."""
    setattr(method, _MARK, True)
    return method


class ChecksOverrides:
    """Goes last among the bases of a class that overrides DeepSpeed's methods: first, it would change its layout.

    Making such a class raises ConfigError where a method marked by `overrides` has no stock method behind it, or does
    not take every call that the stock one takes; and where one that is not marked has a stock method behind it. Mixins
    are checked in the classes that join them with one of `STOCK_CLASSES`.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, STOCK_CLASSES):
            faults = override_faults(cls)
            if faults:
                raise refusal(faults)


def override_faults(cls: type) -> list[str]:
    """Return the faults, as sentences, of the methods by which ``cls`` overrides DeepSpeed's."""
    faults = []
    for owner, name, value in _own_methods(cls):
        marked = getattr(_function(value), _MARK, False)
        stock_owner, stock = _stock_method(cls, name)
        ours = f"{owner.__name__}.{name}"
        if stock_owner is None:
            if marked:
                faults.append(f"it has no {_stock_base(cls).__name__}.{name}, which {ours} overrides")
        elif not marked:
            hint = " (mark it with @compat.overrides if it is meant to)" if is_known() else ""
            faults.append(f"it has a {stock_owner.__name__}.{name}, which {ours} would replace unintended{hint}")
        elif isinstance(value, FunctionType) and isinstance(stock, FunctionType):
            found, taken = parameters_of(stock), parameters_of(value)
            if not takes(taken, found):
                faults.append(
                    f"its {stock_owner.__name__}.{name} takes ({', '.join(found)}), and {ours}, which overrides it, "
                    f"({', '.join(taken)})"
                )
    return faults


def require_known_deepspeed(optimizer: ZeROOptimizer) -> None:
    """Raise ConfigError unless ``optimizer`` has all that this package relies on."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        faults = name_faults(optimizer, DeepSpeedZeroOptimizer_Stage3, ZERO3)
    else:
        faults = name_faults(optimizer, DeepSpeedZeroOptimizer, ZERO12)
    if faults:
        raise refusal(faults)


def require_known_engine(engine: DeepSpeedEngine) -> None:
    """Raise ConfigError unless ``engine`` has all that this package relies on."""
    faults = name_faults(engine, DeepSpeedEngine, ENGINE)
    if faults:
        raise refusal(faults)


def of_installed(names: StockNames) -> StockNames:
    """Return those of ``names`` that the installed release has to have, in the form that it had then."""
    newer = {name for name, release in names.since.items() if installed() < Version(release)}
    earlier = {name: form for name, form in names.before.items() if name in newer}
    methods = {name: form for name, form in names.methods.items() if name not in newer}
    methods.update((name, form) for name, form in earlier.items() if form != ATTRIBUTE)
    attributes = {*names.attributes} - newer | {name for name, form in earlier.items() if form == ATTRIBUTE}
    conditional = {flag: tuple(name for name in some if name not in newer) for flag, some in names.conditional.items()}
    return replace(
        names, methods=dict(sorted(methods.items())), attributes=tuple(sorted(attributes)), conditional=conditional
    )


def name_faults(instance: Any, stock: type, names: StockNames) -> list[str]:
    """Return which of ``names`` the ``instance`` of ``stock`` lacks or has in another form, in words."""
    cls, title, names = type(instance), stock.__name__, of_installed(names)
    faults = []
    for name, recorded in names.methods.items():
        method = getattr(cls, name, None)
        if method is None:
            faults.append(f"it has no {title}.{name}")
        elif isinstance(method, FunctionType) and not takes(found := parameters_of(method), _parsed(recorded)):
            faults.append(f"its {title}.{name} takes ({', '.join(found)}), not ({recorded})")
    conditional = [listed for flag, listed in names.conditional.items() if getattr(instance, flag, False)]
    for name in itertools.chain(names.attributes, *conditional):
        if not _has(instance, name):
            faults.append(f"its {title} has no attribute {name}")
    return faults


def parameters_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameters of ``method`` but the first: "name", "name=" with a default, "*", "*args", "**kwargs"."""
    found: list[str] = []
    keyword_only = False
    for parameter in list(inspect.signature(_unwrapped(method)).parameters.values())[1:]:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            keyword_only = True
            found.append(f"*{parameter.name}")
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.append(f"**{parameter.name}")
        else:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
                keyword_only = True
                found.append("*")
            found.append(parameter.name if parameter.default is inspect.Parameter.empty else f"{parameter.name}=")
    return tuple(found)


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method behind DeepSpeed's `instrument_w_nvtx` (utils/nvtx.py), which sets no ``__wrapped__``."""
    while set(inspect.signature(method).parameters) == {"args", "kwargs"}:
        cells = getattr(method, "__closure__", None) or ()
        wrapped = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)]
        if len(wrapped) != 1:
            break
        method = wrapped[0]
    return method


def takes(callee: tuple[str, ...], caller: tuple[str, ...]) -> bool:
    """Return whether a method with parameters ``callee`` can be called as one with parameters ``caller``.

    A name that is passed by position must stand at the same place or be taken by ``*args``; additional parameters of
    ``callee`` need a default.
    """
    positional, keyword_only, any_positional, any_keyword = _sorted(callee)
    wanted, wanted_keywords, wants_positional, wants_keyword = _sorted(caller)
    by_name = {name.rstrip("=") for name in positional + keyword_only}
    for place, name in enumerate(wanted):
        if place < len(positional):
            if positional[place].rstrip("=") != name.rstrip("="):
                return False
            if name.endswith("=") and not positional[place].endswith("="):
                return False
        elif not (any_positional or any_keyword):
            return False
    if not all(any_keyword or name.rstrip("=") in by_name for name in wanted_keywords):
        return False
    if (wants_positional and not any_positional) or (wants_keyword and not any_keyword):
        return False
    given = {name.rstrip("=") for name in wanted + wanted_keywords}
    return all(name.endswith("=") or name in given for name in positional + keyword_only)


def _sorted(parameters: tuple[str, ...]) -> tuple[list[str], list[str], bool, bool]:
    """``parameters`` as (positional, keyword-only, whether there is *args, whether there is **kwargs)."""
    positional: list[str] = []
    keyword_only: list[str] = []
    current = positional
    for name in parameters:
        if name.startswith("*"):
            current = keyword_only
        else:
            current.append(name)
    any_positional = any(name.startswith("*") and name.strip("*") and name[1] != "*" for name in parameters)
    return positional, keyword_only, any_positional, any(name.startswith("**") for name in parameters)


def _parsed(recorded: str) -> tuple[str, ...]:
    return tuple(recorded.split(", ")) if recorded else ()


def _own_methods(cls: type) -> Iterator[tuple[type, str, Any]]:
    """Yield (owner, name, value) of the methods and properties that ``cls`` gets from this package and its heirs."""
    seen = set()
    for owner in cls.__mro__:
        if _is_stock(owner) or owner is ChecksOverrides or not issubclass(owner, (ChecksOverrides, *STOCK_CLASSES)):
            continue
        for name, value in vars(owner).items():
            if isinstance(value, (FunctionType, property)) and not name.startswith("__") and name not in seen:
                seen.add(name)
                yield owner, name, value


def _function(value: Any) -> Any:
    return value.fget if isinstance(value, property) else value


def _is_stock(cls: type) -> bool:
    """Return whether ``cls`` is DeepSpeed's, or stands in for what an older release of it lacks."""
    return cls.__module__.split(".")[0] == "deepspeed" or cls.__module__ == older.__name__


def _stock_method(cls: type, name: str) -> tuple[type | None, Any]:
    """Return DeepSpeed's class that gives ``cls`` a method or property ``name``, and that; else (None, None)."""
    for owner in cls.__mro__:
        if _is_stock(owner) and name in vars(owner):
            return owner, vars(owner)[name]
    return None, None


def _stock_base(cls: type) -> type:
    return next(stock for stock in STOCK_CLASSES if issubclass(cls, stock))


def _has(instance: Any, name: str) -> bool:
    """Return whether ``instance`` has ``name`` itself, not through an engine's `__getattr__` to the module."""
    return name in vars(instance) or hasattr(type(instance), name) or name in vars(instance).get("_modules", ())
