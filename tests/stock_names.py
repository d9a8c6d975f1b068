"""Which of DeepSpeed's names the code of ds_agsel reads, sets, calls or overrides, derived from its source.

``python tests/stock_names.py`` rewrites `ds_agsel/zero/compat/names.py`, which the guard holds DeepSpeed to; run it
when tests/unit/test_guard.py says that the list is out of date. A name that an optimizer has in some configurations
alone belongs into `CONDITIONAL` below.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

import ds_agsel
from ds_agsel.zero.compat import gradients, guard, versions, views

ROOT = Path(__file__).resolve().parents[1]
NAMES_FILE = ROOT / "ds_agsel" / "zero" / "compat" / "names.py"

STOCKS = {"ZERO12": DeepSpeedZeroOptimizer, "ZERO3": DeepSpeedZeroOptimizer_Stage3, "ENGINE": DeepSpeedEngine}
OPTIMIZERS = frozenset({"ZERO12", "ZERO3"})
# By the optimizer's own flag: what is there where it is true, and may be missing elsewhere.
CONDITIONAL: dict[str, dict[str, set[str]]] = {
    "ZERO12": {
        # stage_1_and_2.py:925; with CPU offload it is true, too
        "contiguous_gradients": {"grads_in_partition", "grads_in_partition_offset"},
        "cpu_offload": {
            "_offload_accumulated_param_ids",
            "accumulated_grads_in_cpu",
            "grad_position",
            "local_overflow",
            "norm_for_param_grads",
            "param_buffer_of_bit16_for_cpu_offload_groups",
        },
    },
    "ZERO3": {"offload_optimizer": {"norm_for_param_grads", "subgroup_to_device"}},
    "ENGINE": {},
}
# The release that brought a name, where it is not the oldest known one.
SINCE: dict[str, dict[str, str]] = {
    "ZERO12": {
        "_coalesce_grad_reduction": "0.19.1",
        "_get_compact_grad_partition_slice": "0.19.8",
        "_get_preflattened_grad_partition": "0.19.2",
        "_offload_accumulated_param_ids": "0.19.5",
        "_restore_cpu_offload_grad_to_gpu": "0.19.5",
        "_use_compact_grad_partition_buffer": "0.19.8",
        "_wait_for_offload_copies": "0.19.8",
        "compute_grad_norm": "0.19.7",
        "copy_grads_in_partition": "0.19.8",
        "is_gradient_accumulation_boundary": "0.19.5",
        "reduce_ipg_grads": "0.18.5",
        "round_robin_bit16_offsets": "0.19.7",
        "round_robin_bit16_padding": "0.19.7",
        "set_gradient_accumulation_boundary": "0.19.5",
    },
    "ZERO3": {
        "_get_param_partition_rank": "0.19.3",
        "_get_param_partition_world_size": "0.19.3",
        "_offload_grad_partition_at_boundary": "0.19.5",
        "is_gradient_accumulation_boundary": "0.19.5",
        "set_gradient_accumulation_boundary": "0.19.5",
        "sub_group_partition_counts": "0.19.3",
        "sub_group_process_groups": "0.19.3",
    },
    "ENGINE": {"_compile_mode": "0.19.8"},
}
# What the releases before that have under the same name: a method's parameters, or an attribute.
BEFORE: dict[str, dict[str, str]] = {
    "ZERO12": {
        "copy_grads_in_partition": "param",
        "is_gradient_accumulation_boundary": guard.ATTRIBUTE,
        "reduce_ipg_grads": "",
    },
    "ZERO3": {"is_gradient_accumulation_boundary": guard.ATTRIBUTE},
    "ENGINE": {},
}


Types = dict[str, frozenset[str]]  # by class: the stock classes that an object of it may be
Scope = dict[str, frozenset[str]]  # by variable, or "self.name"


@dataclass
class Derived:
    """What the code uses of one stock class. ``unknown``: used on it, and neither stock's nor ours."""

    methods: dict[str, str] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)


def derive() -> dict[str, Derived]:
    """Return what ds_agsel uses of each of `STOCKS`."""
    modules = list(our_modules())
    classes = our_classes(modules)
    held = held_by_classes(modules, classes)
    used: dict[str, set[str]] = {key: set() for key in STOCKS}
    for module in modules:
        tree = ast.parse(inspect.getsource(module))
        for keys, name in Uses(tree, classes, held).found():
            known = [key for key in keys if name in stock_names(STOCKS[key])]
            for key in known or keys:
                used[key].add(name)
    ours = own_names(classes)
    found = {}
    for key, names in used.items():
        stock = STOCKS[key]
        derived = Derived()
        for name in sorted(names):
            if name in stock_names(stock):
                method = inspect.getattr_static(stock, name, None)
                if isinstance(method, FunctionType):
                    derived.methods[name] = ", ".join(guard.parameters_of(method))
                else:
                    derived.attributes.add(name)
            elif name not in ours and not hasattr(nn.Module, name) and not name.startswith("__"):
                derived.unknown.add(name)
        found[key] = derived
    return found


def our_modules() -> Iterator[Any]:
    for info in pkgutil.walk_packages(ds_agsel.__path__, "ds_agsel."):
        path = Path(info.module_finder.path, info.name.rsplit(".", 1)[-1])  # type: ignore[union-attr]
        if "deepspeed" in _text(path):
            yield importlib.import_module(info.name)


def _text(path: Path) -> str:
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return file.read_text(encoding="utf-8") + ("deepspeed" if "compat" in file.read_text(encoding="utf-8") else "")


def our_classes(modules: list[Any]) -> Types:
    """By class name, ours and DeepSpeed's: the stock classes that an object of that type may be."""
    found = {stock.__name__: frozenset({key}) for key, stock in STOCKS.items()}
    found["ZeROOptimizer"] = OPTIMIZERS
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("ds_agsel.")
    }
    for cls in classes:
        heirs = [other for other in classes if cls in other.__mro__]
        keys = {key for key, stock in STOCKS.items() for heir in heirs if stock in heir.__mro__}
        if keys and {ZeROOptimizer, DeepSpeedEngine} & set(cls.__mro__):
            found[cls.__name__] = frozenset(keys)
    return found


def own_names(classes: Types) -> set[str]:
    """What our classes define and set on themselves."""
    found = set()
    for module in our_modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ClassDef) and node.name in classes:
                found |= defined_names(node)
    return found | {"selection"}  # set by `initialize`


_stock_names: dict[type, set[str]] = {}


def stock_names(stock: type) -> set[str]:
    """What ``stock`` and its bases of DeepSpeed's define, and set on themselves anywhere."""
    if stock not in _stock_names:
        found = set()
        for cls in stock.__mro__:
            if cls.__module__.startswith("deepspeed."):
                (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body
                assert isinstance(node, ast.ClassDef)
                found |= {_mangled(name, cls.__name__) for name in defined_names(node)}
        _stock_names[stock] = found
    return _stock_names[stock]


def _mangled(name: str, cls: str) -> str:
    return f"_{cls}{name}" if name.startswith("__") and not name.endswith("__") else name


def defined_names(node: ast.ClassDef) -> set[str]:
    found = set()
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(item.name)
        elif isinstance(item, ast.Assign):
            found |= {target.id for target in item.targets if isinstance(target, ast.Name)}
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            found.add(item.target.id)
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and _is_name(child.value, "self"):
            found.add(child.attr)
        if isinstance(child, ast.Subscript) and ast.unparse(child.value) == "self.__dict__":
            found.add(ast.literal_eval(child.slice))
    return found


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def of_annotation(annotation: ast.expr | None, classes: Types) -> frozenset[str]:
    return frozenset() if annotation is None else classes.get(_last(annotation), frozenset())


def held_by_classes(modules: list[Any], classes: Types) -> dict[str, Scope]:
    """By class, "self.name" by what stock objects it, or a base of its, was given to hold."""
    nodes = {
        node.name: node
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ClassDef)
    }

    def held_by(name: str) -> Scope:
        node = nodes.get(name)
        held: Scope = {}
        for base in node.bases if node else ():
            held.update(held_by(_last(base)))
        for function in node.body if node else ():
            if isinstance(function, ast.FunctionDef):
                given = {a.arg: of_annotation(a.annotation, classes) for a in function.args.args}
                for item in ast.walk(function):
                    if isinstance(item, ast.Assign) and isinstance(item.value, ast.Name) and given.get(item.value.id):
                        for target in item.targets:
                            if isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
                                held[f"self.{target.attr}"] = given[item.value.id]
        return held

    return {name: held_by(name) for name in nodes}


class Uses:
    """The uses of stock objects in one module: ``self`` in our classes, arguments annotated as one, what they own."""

    def __init__(self, tree: ast.Module, classes: Types, held: dict[str, Scope]) -> None:
        self._tree = tree
        self._classes = classes
        self._held = held

    def found(self) -> Iterator[tuple[frozenset[str], str]]:
        yield from self._in_body(self._tree.body, {})

    def _in_body(self, body: list[ast.stmt], scope: Scope) -> Iterator[tuple[frozenset[str], str]]:
        for node in body:
            yield from self._in(node, scope)

    def _in(self, node: ast.AST, scope: Scope) -> Iterator[tuple[frozenset[str], str]]:
        if isinstance(node, ast.ClassDef):
            inner = {key: value for key, value in scope.items() if key != "self"}
            if node.name in self._classes:
                inner["self"] = self._classes[node.name]
                for item in node.body:  # what it stands in the place of
                    if isinstance(item, ast.FunctionDef) and any(_last(d) == "overrides" for d in item.decorator_list):
                        yield self._classes[node.name], item.name
                    if isinstance(item, ast.Assign):
                        names = [target.id for target in item.targets if isinstance(target, ast.Name)]
                        yield from ((self._classes[node.name], name) for name in names)
                    if isinstance(item, ast.AnnAssign) and item.value is None and isinstance(item.target, ast.Name):
                        yield self._classes[node.name], item.target.id
            inner.update(self._held.get(node.name, {}))
            yield from self._in_body(node.body, inner)
            return
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            scope = dict(scope)
            arguments = node.args
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
                if argument.arg != "self":
                    scope.pop(argument.arg, None)
                keys = self._of_annotation(argument.annotation)
                if keys:
                    scope[argument.arg] = keys
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            keys = self._resolve(node.value, scope)
            if keys:
                scope[node.targets[0].id] = keys
        if isinstance(node, ast.Match):
            yield from self._in_match(node, scope)
        yield from self._here(node, scope)
        for child in ast.iter_child_nodes(node):
            yield from self._in(child, scope)

    def _here(self, node: ast.AST, scope: Scope) -> Iterator[tuple[frozenset[str], str]]:
        if isinstance(node, ast.Attribute):
            keys = self._resolve(node.value, scope)
            if keys:
                yield keys, node.attr
        elif isinstance(node, ast.Call) and node.args:
            keys = self._resolve(node.args[0], scope)
            if keys and _last(node.func) == guard.ATTRIBUTE:
                yield from ((keys, keyword.arg) for keyword in node.keywords if keyword.arg)
            elif keys and _last(node.func) in ("getattr", "setattr", "hasattr") and len(node.args) > 1:
                yield from ((keys, name) for name in _strings(node.args[1], keys))

    def _in_match(self, node: ast.Match, scope: Scope) -> Iterator[tuple[frozenset[str], str]]:
        for case in node.cases:
            for pattern in ast.walk(case.pattern):
                if isinstance(pattern, ast.MatchClass):
                    keys = self._classes.get(_last(pattern.cls), frozenset())
                    yield from ((keys, name) for name in pattern.kwd_attrs if keys)

    def _of_annotation(self, annotation: ast.expr | None) -> frozenset[str]:
        return of_annotation(annotation, self._classes)

    def _resolve(self, node: ast.expr, scope: Scope) -> frozenset[str]:
        """The stock classes that the value of ``node`` may be of; empty: of none."""
        if isinstance(node, ast.Name):
            return scope.get(node.id, frozenset())
        if isinstance(node, ast.Call) and _is_name(node.func, "super"):
            return scope.get("self", frozenset())
        if isinstance(node, ast.Attribute):
            if _is_name(node.value, "self") and f"self.{node.attr}" in scope:
                return scope[f"self.{node.attr}"]
            if node.attr == "optimizer" and self._resolve(node.value, scope) == {"ENGINE"}:
                return OPTIMIZERS
        return frozenset()


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _strings(node: ast.expr, keys: frozenset[str]) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else gradients.STAGE3_PRIVATE for part in node.values]
        return ["".join(parts)]
    if _is_name(node, "name"):  # one of the views' lists
        lists = []
        if "ZERO12" in keys:
            lists += [*views.GROUP_LISTS, *views.OFFLOAD_GROUP_LISTS, *views.GROUP_DICTS]
        if "ZERO3" in keys:
            lists += [*views.SUB_GROUP_LISTS, *views.SUB_GROUP_DICTS, *views.OFFLOAD_SUB_GROUP_DICTS]
        return lists
    return []


def rendered(derived: dict[str, Derived]) -> str:
    """Return the text of `NAMES_FILE`."""
    lines = [
        '"""DeepSpeed\'s names that this package relies on. Written by tests/stock_names.py, not by hand."""',
        "# ruff: noqa: E501",
        "from __future__ import annotations",
        "",
        "from collections.abc import Mapping",
        "from dataclasses import dataclass",
        "@dataclass(frozen=True)",
        "class StockNames:",
        '    """What is used of one stock class.',
        "",
        "    Attributes:",
        "        methods: parameters by name, as `guard.parameters_of` gives them.",
        "        attributes: there once an instance is made.",
        "        conditional: by the name of a flag of the instance, what is there where that is true.",
        "        since: the release that brought a name, where it is not the oldest known one.",
        "        before: what releases before that have under a name of `since`: parameters, or `guard.ATTRIBUTE`.",
        '    """',
        "    methods: Mapping[str, str]",
        "    attributes: tuple[str, ...]",
        "    conditional: Mapping[str, tuple[str, ...]]",
        "    since: Mapping[str, str]",
        "    before: Mapping[str, str]",
    ]
    for key, names in derived.items():
        conditional = {flag: tuple(sorted(names.attributes & some)) for flag, some in CONDITIONAL[key].items()}
        plain = sorted(names.attributes.difference(*conditional.values()))
        lines.append(
            f"{key} = StockNames(methods={dict(sorted(names.methods.items()))!r}, attributes={tuple(plain)!r}, "
            f"conditional={conditional!r}, since={SINCE[key]!r}, before={BEFORE[key]!r},)"
        )
    command = ["ruff", "format", "--stdin-filename", NAMES_FILE.name, "-"]
    return subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=True).stdout


def main() -> None:
    if versions.deepspeed_version() != versions.KNOWN_VERSIONS[-1]:
        sys.exit(f"install deepspeed {versions.KNOWN_VERSIONS[-1]} first: the list is that of the newest known release")
    derived = derive()
    unknown = {key: sorted(names.unknown) for key, names in derived.items() if names.unknown}
    if unknown:
        sys.exit(f"used, and neither DeepSpeed's nor ours: {unknown}")
    NAMES_FILE.write_text(rendered(derived), encoding="utf-8")


if __name__ == "__main__":
    main()
