"""The rooms of docs/design.md: who imports whom, who may name DeepSpeed's own, how long a file is, what is cited."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = 450
# What plain DeepSpeed offers its users; the rest of it is touched under ds_agsel/zero/compat.
PUBLIC_DEEPSPEED = {
    "deepspeed", "deepspeed.accelerator", "deepspeed.comm", "deepspeed.ops.adam", "deepspeed.ops.op_builder",
    "deepspeed.checkpoint.constants", "deepspeed.moe.utils", "deepspeed.runtime.pipe.module",
}  # fmt: skip
# Documents that are not in the repository, numbered promises and tickets.
ABSENT = re.compile(
    r"\.\./shared|work/shared|\b(?:DESIGN|STYLE|DEEPSPEED|SEEDS|PAPER|NEXT)\.md\b|\b[Pp]romises? \d|\bissue \d+\b"
)
TEXT = {".py", ".md", ".toml", ".json", ".yml", ".yaml", ".cpp", ".txt", ".sh", ".j2", ""}


def rooms() -> list[tuple[str, ...]]:
    """The packages and modules of each line of docs/design.md's list, in order."""
    block = re.search(r"^```rooms\n(.*?)^```", (ROOT / "docs/design.md").read_text(), re.M | re.S)
    assert block, "docs/design.md has no block of rooms"
    return [tuple(re.split(r",\s*", re.split(r"\s{2,}", line)[0])) for line in block[1].splitlines()]


@functools.cache
def tracked() -> tuple[Path, ...]:
    """The repository's files; what git lists, so that build products and environments stay out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return tuple(path for path in map(ROOT.joinpath, listed.stdout.splitlines()) if path.is_file())


def sources(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute name, whether it runs when the module is imported) of each import; none for annotations alone.

    ``from a import b`` is named a.b: which may be a module or what it holds.
    """
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if is_for_types(child):
                continue
            if isinstance(child, ast.Import):
                yield from ((child.lineno, name.name, at_import) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                start = ".".join([*base, *([child.module] if child.module else [])])
                yield from ((child.lineno, f"{start}.{name.name}", at_import) for name in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_import and not inside)

    return visit(tree(path), True)


def room_of(name: str) -> int | None:
    """The number of the line whose room holds the module ``name``, by the longest match."""
    found = [
        (len(room), number)
        for number, line in enumerate(rooms())
        for room in line
        if name == room or name.startswith(room + ".")
    ]
    return max(found)[1] if found else None


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_module_is_in_a_room():
    entrances = {"ds_agsel", "ds_agsel.__main__", "ds_agsel._version"}
    homeless = [
        module_of(path)
        for path in sources("ds_agsel", "launch")
        if room_of(module_of(path)) is None and module_of(path) not in entrances and path.parent != ROOT / "launch"
        and path.relative_to(ROOT).parts[:2] != ("launch", "examples")
    ]  # fmt: skip
    assert homeless == []


def test_imports_run_down_the_list_of_rooms():
    wrong = []
    for path in sources("ds_agsel", "launch"):
        here = room_of(module_of(path))
        if here is None:  # the package itself and the command lines, which may import anything
            continue
        for line, name, _ in imports(path):
            there = room_of(name)
            if there is not None and there > here:
                wrong.append(f"{where(path, line)} imports {name}, which stands below it")
    assert wrong == []


def test_no_import_circle():
    modules = {module_of(path): path for path in sources("ds_agsel", "launch")}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        edges[module] = set()
        for _, name, at_import in imports(path):
            target = name if name in modules else name.rpartition(".")[0]
            if at_import and target in modules and target != module:
                edges[module].add(target)
    done: set[str] = set()

    def circle(module: str, trail: tuple[str, ...]) -> tuple[str, ...]:
        if module in trail:
            return (*trail[trail.index(module) :], module)
        if module in done:
            return ()
        for target in sorted(edges[module]):
            # A package's __init__ that imports its own parts is how Python packages are written.
            found = () if module.startswith(target + ".") else circle(target, (*trail, module))
            if found:
                return found
        done.add(module)
        return ()

    assert [found for module in sorted(modules) if (found := circle(module, ()))] == []


def test_nothing_above_zero_imports_deepspeed():
    zero = min(room_of("ds_agsel.zero.compat") or 0, room_of("ds_agsel.zero") or 0)
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in sources("ds_agsel")
        if (here := room_of(module_of(path))) is not None and here < zero
        for line, name, _ in imports(path)
        if name.split(".")[0] == "deepspeed"
    ]
    assert wrong == []


def test_deepspeeds_inner_modules_are_imported_under_compat_alone():
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in sources("ds_agsel")
        if not module_of(path).startswith("ds_agsel.zero.compat")
        for line, name, _ in imports(path)
        if name.split(".")[0] == "deepspeed" and not {name, name.rpartition(".")[0]} & PUBLIC_DEEPSPEED
    ]
    assert wrong == []


def test_deepspeeds_private_names_are_read_under_compat_alone():
    """An underscored attribute of an engine or optimizer that isn't `self` and that no class of ours defines."""
    ours = {
        name
        for path in sources("ds_agsel")
        for node in ast.walk(tree(path))
        for name in defined(node)
    }  # fmt: skip
    wrong = [
        f"{where(path, node.lineno)} reads {node.value.id}.{node.attr}"
        for path in sources("ds_agsel")
        if not module_of(path).startswith("ds_agsel.zero.compat")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in HOLDERS
        and node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in ours
    ]  # fmt: skip
    assert wrong == []


HOLDERS = {"engine", "optimizer", "zero", "zero_optimizer", "stock", "plain", "swapper"}


def defined(node: ast.AST) -> Iterator[str]:
    """The attribute names that ``node`` gives to a class or an object of ours."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.AnnAssign | ast.Assign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for inner in ast.walk(target):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    yield inner.attr
                elif isinstance(inner, ast.Name):
                    yield inner.id


def test_no_file_is_longer_than_a_reader_can_hold():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources("ds_agsel", "launch", "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert long == {}


def test_nothing_names_a_document_that_is_not_here():
    wrong = []
    for path in tracked():
        if path.suffix not in TEXT or path == Path(__file__).resolve() or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            wrong += [f"{where(path, number)} names {found[0]!r}" for found in ABSENT.finditer(line)]
    assert wrong == []


def test_links_between_documents_lead_somewhere():
    wrong = []
    for path in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(ROOT)} links to {target}")
    assert wrong == []


def test_the_import_is_light():
    script = "import sys, ds_agsel; print(*sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("ds_agsel.errors", 0),
        ("ds_agsel.zero.compat.views", "ds_agsel.zero.compat"),
        ("ds_agsel.zero.window", "ds_agsel.zero"),
    ],
)
def test_a_module_belongs_to_the_innermost_room_that_holds_it(name, room):
    number = room_of(name)
    assert number is not None and (room == number or room in rooms()[number])
