"""The guard: its lists are those of the code, and a DeepSpeed that moved any name in them is refused by that name."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import stock_names
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_agsel.errors import ConfigError
from ds_agsel.zero import compat
from ds_agsel.zero.compat import guard, names, older, versions
from ds_agsel.zero.engine import SelectiveEngine
from ds_agsel.zero.stage3 import SelectiveZero3Optimizer
from ds_agsel.zero.stage12 import SelectiveZeroOptimizer

WRITTEN = {"ZERO12": names.ZERO12, "ZERO3": names.ZERO3, "ENGINE": names.ENGINE}
LISTS = {key: guard.of_installed(listed) for key, listed in WRITTEN.items()}
OURS = {"ZERO12": SelectiveZeroOptimizer, "ZERO3": SelectiveZero3Optimizer, "ENGINE": SelectiveEngine}
METHODS = [(key, name) for key, listed in LISTS.items() for name in listed.methods]


def attributes_of(listed: names.StockNames) -> list[str]:
    return [*listed.attributes, *(name for some in listed.conditional.values() for name in some)]


def is_stood_in_for(cls: type, name: str) -> bool:
    """Whether `compat.older` has the method for the installed release: what stands behind is held by the lists."""
    owner, _ = guard._stock_method(cls, name)
    return owner is not None and owner.__module__ == older.__name__


ATTRIBUTES = [(key, name) for key, listed in LISTS.items() for name in attributes_of(listed)]
OVERRIDES = sorted(
    {
        (key, name)
        for key, cls in OURS.items()
        for _, name, value in guard._own_methods(cls)
        if getattr(guard._function(value), guard._MARK, False) and not is_stood_in_for(cls, name)
    }
)
REMEDY = re.escape(f"pip install 'deepspeed=={compat.KNOWN_VERSIONS[-1]}'")


def require(key: str, instance: Any) -> None:
    (compat.require_known_engine if key == "ENGINE" else compat.require_known_deepspeed)(instance)


def whole(key: str) -> Any:
    """An instance of the stock class that has each listed attribute, and was never built."""
    stock = stock_names.STOCKS[key]
    instance = stock.__new__(stock)
    listed = LISTS[key]
    for name in attributes_of(listed):
        if not hasattr(stock, name):
            instance.__dict__[name] = object()
    return instance


def owner_of(cls: type, name: str) -> type:
    return next(owner for owner in cls.__mro__ if name in vars(owner))


# -------------------------------------------------------------------------- the lists


def test_the_lists_are_those_of_the_code() -> None:
    """Both ways: no name that the code uses is missing, and none is listed that nothing uses."""
    derived = stock_names.derive()
    remedy = "run python tests/stock_names.py"
    for key, used in derived.items():
        listed = LISTS[key]
        newer = set(WRITTEN[key].since) - set(listed.methods) - set(attributes_of(listed))
        unknown = used.unknown - newer
        assert not unknown, f"{key}: used, and neither DeepSpeed's nor ours: {sorted(unknown)}"
        assert not newer & stock_names.stock_names(stock_names.STOCKS[key]), "in SINCE, and there already"
        attributes = set(attributes_of(listed))
        assert set(listed.methods) ^ set(used.methods) == set(), remedy
        assert attributes ^ used.attributes == set(), remedy
        assert dict(listed.methods) == used.methods, remedy
    if versions.deepspeed_version() != compat.KNOWN_VERSIONS[-1]:
        return  # the file is written with the newest
    assert stock_names.NAMES_FILE.read_text(encoding="utf-8") == stock_names.rendered(derived), remedy


def test_the_lists_have_names_that_were_missing_once() -> None:
    """Names that an earlier list, kept by hand, did not have."""
    assert {"scaled_global_norm", "get_param_id", "_wait_for_offload_copies"} <= set(names.ZERO12.methods)
    assert {"get_param_id", "_partitioned_params_swap_out"} <= set(names.ZERO3.methods)
    assert {"_load_zero_checkpoint", "forward", "step", "_copy_recovery_script"} <= set(names.ENGINE.methods)
    assert {"checkpoint_engine", "_is_compiled"} <= set(names.ENGINE.attributes)


def test_uses_are_found_however_they_are_written() -> None:
    source = """
class SelectiveZeroOptimizer:
    declared: int
    assigned = property(1)
    def __init__(self, other: "x", engine: compat.DeepSpeedEngine):
        self._engine = engine
    @compat.overrides
    def replaced(self, argument):
        self.read, super().called()
        self.written = argument.not_stock
        with compat.attribute(self, by_keyword=1):
            hold = lambda: self.inside
    def method(self):
        self._engine.of_engine
        zero = self._engine.optimizer
        zero.of_either
class Other:
    def method(self):
        self.not_stock
def function(optimizer: compat.DeepSpeedZeroOptimizer_Stage3, engine: DeepSpeedEngine, any):
    getattr(optimizer, "by_string")
    getattr(optimizer, f"{STAGE3_PRIVATE}private")
    optimizer.other.not_stock
    any.not_stock
    match any:
        case DeepSpeedZeroOptimizer_Stage3(matched=True):
            pass
"""
    classes = {
        "SelectiveZeroOptimizer": frozenset({"ZERO12"}),
        "DeepSpeedZeroOptimizer_Stage3": frozenset({"ZERO3"}),
        "DeepSpeedEngine": frozenset({"ENGINE"}),
    }
    found: dict[str, set[str]] = {}
    held = {"SelectiveZeroOptimizer": {"self._engine": frozenset({"ENGINE"})}}
    for keys, name in stock_names.Uses(ast.parse(source), classes, held).found():
        found.setdefault("+".join(sorted(keys)), set()).add(name)
    assert found == {
        "ZERO12": {
            *("declared", "assigned", "replaced", "read", "called", "written", "by_keyword", "inside", "_engine"),
        },
        "ENGINE": {"of_engine", "optimizer"},
        "ZERO12+ZERO3": {"of_either"},
        "ZERO3": {"by_string", "_DeepSpeedZeroOptimizer_Stage3__private", "other", "matched"},
    }


# ------------------------------------------------------------------- names that are gone


@pytest.mark.parametrize("key", LISTS)
def test_the_installed_deepspeed_is_taken(key: str) -> None:
    require(key, whole(key))


@pytest.mark.parametrize(("key", "name"), METHODS)
def test_a_method_that_is_gone_is_named(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_names.STOCKS[key]
    instance = whole(key)
    while hasattr(stock, name):  # also the ones of its bases that it replaces
        monkeypatch.delattr(owner_of(stock, name), name)
    with pytest.raises(ConfigError, match=rf"has no {stock.__name__}\.{name}\b.*{REMEDY}"):
        require(key, instance)


@pytest.mark.parametrize(("key", "name"), METHODS)
def test_a_method_that_wants_one_more_argument_is_named(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_names.STOCKS[key]
    parameters = [name_.rstrip("=") for name_ in LISTS[key].methods[name].split(", ") if name_]
    monkeypatch.setattr(owner_of(stock, name), name, method_of("added", *parameters))
    with pytest.raises(ConfigError, match=rf"its {stock.__name__}\.{name} takes \(added\b.*{REMEDY}"):
        require(key, whole(key))


@pytest.mark.parametrize(("key", "name"), ATTRIBUTES)
def test_an_attribute_that_is_gone_is_named(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_names.STOCKS[key]
    instance = whole(key)
    instance.__dict__.pop(name, None)
    while hasattr(stock, name):
        monkeypatch.delattr(owner_of(stock, name), name)
    for flag, some in LISTS[key].conditional.items():
        if flag != name:
            instance.__dict__[flag] = name in some
    with pytest.raises(ConfigError, match=rf"its {stock.__name__} has no attribute {name}\b.*{REMEDY}"):
        require(key, instance)


def test_an_engine_is_not_asked_through_the_users_module() -> None:
    """`DeepSpeedEngine.__getattr__` answers with what the model has under that name."""
    engine = whole("ENGINE")
    engine.__dict__.pop("monitor")
    engine.__dict__["_modules"] = {}
    engine.__dict__["module"] = SimpleNamespace(monitor=1)
    with pytest.raises(ConfigError, match="DeepSpeedEngine has no attribute monitor"):
        compat.require_known_engine(engine)


# ------------------------------------------------------------------------ overrides


def method_of(*parameters: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(f"def method(self, {', '.join(parameters)}): pass", scope)
    return scope["method"]


def make_again(cls: type) -> type:
    """Make a class as the import of its module does, with the installed DeepSpeed as it is now."""
    return type(cls)(cls.__name__, (cls,), {})


@pytest.mark.parametrize("cls", OURS.values())
def test_our_classes_can_be_made(cls: type) -> None:
    make_again(cls)


@pytest.mark.parametrize("key", OURS)
def test_a_checked_class_fits_deepspeeds_objects(key: str) -> None:
    instance = whole(key)
    compat.swap_class(instance, OURS[key])
    assert type(instance) is OURS[key]


@pytest.mark.parametrize(("key", "name"), OVERRIDES)
def test_an_override_that_deepspeed_would_not_call_is_refused(
    key: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_names.STOCKS[key]
    for owner in stock.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.raises(ConfigError, match=rf"has no {stock.__name__}\.{name}, which \w+\.{name} overrides.*{REMEDY}"):
        make_again(OURS[key])


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, name in OVERRIDES if (key, name) in METHODS])
def test_an_override_that_takes_other_arguments_is_refused(
    key: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_names.STOCKS[key]
    ours = next(value for _, own, value in guard._own_methods(OURS[key]) if own == name)
    known = [parameter.rstrip("=") for parameter in guard._parsed(LISTS[key].methods[name]) if "*" not in parameter]
    monkeypatch.setattr(owner_of(stock, name), name, method_of(*known, "*", "added"))
    if any(parameter.startswith("**") for parameter in guard.parameters_of(ours)):
        make_again(OURS[key])  # passes on whatever comes
        return
    with pytest.raises(
        ConfigError, match=rf"\.{name} takes \([\w, ]*\*, added\), and \w+\.{name}, which overrides it, "
    ):
        make_again(OURS[key])


def test_a_method_that_deepspeed_gets_later_is_not_replaced_unawares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedZeroOptimizer, "_begin_window", method_of("x"), raising=False)
    with pytest.raises(
        ConfigError, match=r"has a DeepSpeedZeroOptimizer\._begin_window, which \w+\._begin_window would rep"
    ):
        make_again(SelectiveZeroOptimizer)
    make_again(SelectiveZero3Optimizer)


def test_a_mixin_is_checked_in_the_class_that_joins_it() -> None:
    class Mixin(compat.ZeROOptimizer, compat.ChecksOverrides):
        @compat.overrides
        def no_such_method(self) -> None: ...

    with pytest.raises(ConfigError, match=r"no DeepSpeedZeroOptimizer_Stage3\.no_such_method, which Mixin\.no_such"):
        type("Joined", (Mixin, DeepSpeedZeroOptimizer_Stage3), {})


@pytest.mark.parametrize(
    ("callee", "caller", "expected"),
    [
        ("", "", True),
        ("a, b", "a, b", True),
        ("a, b", "a", False),
        ("a, b=", "a", True),
        ("a", "a, b=", False),
        ("a, b", "b, a", False),
        ("a, b", "a, b=", False),
        ("a, b=", "a, b=", True),
        ("a, *rest", "a, b, c=", True),
        ("a, **more", "a, b=, *, c", True),
        ("*args, **kwargs", "a, b=, *, c", True),
        ("a, *, c", "a, *, c", True),
        ("a, *, c", "a", False),
        ("a, *, c=", "a", True),
        ("a", "a, *, c", False),
        ("a, c", "a, *, c", True),
        ("a, *rest", "a, **kwargs", False),
        ("a, **more", "a, *args", False),
        ("a, *args, **kwargs", "a, *args, **kwargs", True),
    ],
)
def test_which_calls_a_method_takes(callee: str, caller: str, expected: bool) -> None:
    assert guard.takes(guard._parsed(callee), guard._parsed(caller)) is expected


def test_parameters_are_read_through_deepspeeds_wrapper() -> None:
    def method(self: Any, a: int, b: int = 1, *c: int, d: int, e: int = 2, **f: int) -> None: ...

    expected = ("a", "b=", "*c", "d", "e=", "**f")
    assert guard.parameters_of(method) == expected
    assert guard.parameters_of(deepspeed.utils.nvtx.instrument_w_nvtx(method)) == expected
    assert guard.parameters_of(method_of("a", "*", "b", "c=1")) == ("a", "*", "b", "c=")


# ------------------------------------------------------------------- the sentence first

OTHER_DEEPSPEED = """
import sys
import deepspeed
{change}
deepspeed.__version__ = "{version}"
try:
    import {module}
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("version", "module", "change", "reason"),
    [
        (
            "0.17.6",
            "ds_agsel.zero.compat",
            "import deepspeed.runtime.torch_autocast as m; del m.sort_dtypes",
            "it is too old. Known to work: 0.18.4, ",
        ),
        (
            deepspeed.__version__,
            "ds_agsel.zero.compat",
            "import deepspeed.runtime.torch_autocast as m; del m.sort_dtypes",
            "cannot import name 'sort_dtypes' from 'deepspeed.runtime.torch_autocast'",
        ),
        pytest.param(
            deepspeed.__version__,
            "ds_agsel.entry.initialize",
            "sys.modules['deepspeed.runtime.tensor_parallel.init_utils'] = None",
            "import of deepspeed.runtime.tensor_parallel.init_utils halted; None in sys.modules",
            marks=pytest.mark.skipif(versions.until("0.18.5"), reason="this release has no such module"),
        ),
        (
            deepspeed.__version__,
            "ds_agsel.entry.initialize",
            "from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as m; del m.process_gradients",
            "it has no DeepSpeedZeroOptimizer.process_gradients, which SelectiveZeroOptimizer.process_gradients ",
        ),
    ],
    ids=["version", "name", "module", "method"],
)
def test_another_deepspeed_is_met_with_the_sentence(version: str, module: str, change: str, reason: str) -> None:
    """In a fresh interpreter: what is missing there would end in an ImportError of something else."""
    script = OTHER_DEEPSPEED.format(version=version, change=change, module=module)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith(f"ConfigError deepspeed=={version} does not fit ds_agsel: {reason}")
    assert last.endswith(f"pip install 'deepspeed=={compat.KNOWN_VERSIONS[-1]}'.")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.17.6", "it is too old"),
        ("0.18.3", "it is too old"),
        ("0.20.0", "it is newer than any release that was tried"),
        ("0.18.9+cu128", None),
        ("0.19.9", None),
    ],
)
def test_a_release_out_of_bounds_is_refused_before_it_is_imported(
    version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    missing = ImportError("cannot import name 'x' from 'deepspeed.y' (file)", name="deepspeed.y")
    expected = reason or "cannot import name 'x' from 'deepspeed.y'"
    tried = []
    with pytest.raises(ConfigError) as caught, versions.imports_of_deepspeed():
        tried.append(version)
        raise missing
    assert str(caught.value) == (
        f"deepspeed=={version} does not fit ds_agsel: {expected}. Known to work: {', '.join(compat.KNOWN_VERSIONS)}; "
        f"install one of them: pip install 'deepspeed=={compat.KNOWN_VERSIONS[-1]}'."
    )
    assert bool(tried) == (reason is None)
    assert compat.is_known() == (version == "0.18.9+cu128")


def test_what_is_missing_besides_deepspeed_is_said_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), versions.imports_of_deepspeed():
        importlib.import_module("no_such_module")


def test_what_a_configuration_does_not_have_is_not_asked_for() -> None:
    """Without contiguous gradients ZeRO-1/2 have no ``grads_in_partition`` (stage_1_and_2.py:925)."""
    for key, listed in LISTS.items():
        instance = whole(key)
        for flag, some in listed.conditional.items():
            instance.__dict__[flag] = False
            for name in some:
                instance.__dict__.pop(name, None)
        require(key, instance)
