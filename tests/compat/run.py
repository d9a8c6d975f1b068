"""`make compat`: the DeepSpeed releases and the ends of the framework versions that we claim, each on its own.

A DeepSpeed release is tried on the packages of the environment that runs this; only deepspeed itself is installed, so
that it costs seconds, beside the build of CPU Adam. An end of the framework versions is installed whole, and so is the
newest one with another Python. What passed is kept in the cache by commit: a run that was stopped goes on where it
was. Prints all as tables; exits with 1 where any failed. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What an end pins beside torch and deepspeed, whose one known version constraints.txt has.
ENDS = {
    "oldest": {"transformers": "4.56.0", "accelerate": "1.10.0", "trl": "0.22.0", "peft": "0.17.0"},
    "newest": {"transformers": "", "accelerate": "", "trl": "", "peft": ""},
}
TESTS = [
    "tests/frameworks/test_hf_trainer.py",
    "tests/frameworks/test_accelerate.py",
    "tests/frameworks/test_trl.py",
    "tests/numerics/test_plain_deepspeed.py",
    "tests/unit/test_blocks.py",
]
NUMERICS = [
    f"tests/numerics/test_{name}.py"
    for name in ("plain_deepspeed", "unselected", "overflow", "resume", "accessors", "traffic", "zero3", "nvme")
]
# The other unit tests have no need of DeepSpeed, or hold the words and fields of the newest one.
GUARD = "tests/unit/test_guard.py"
# By column of the table: a pattern of the test ids, one test of each kind at two ranks.
QUICK = {
    "unit": GUARD,
    "ZeRO-1/2": r"test_policy_all_is_plain_deepspeed\[(stage=1,|dtype)((?!cpu).)*bf16.*-2\]",
    "offload": r"test_policy_all_is_plain_deepspeed\[(stage=1,)?offload=cpu.*bf16.*-2\]",
    "ZeRO-3": r"test_policy_all_is_plain_deepspeed\[stage=3.*bf16.*-2\]",
    "skipped steps": r"test_a_bad_step.*bf16.*-2\]|test_fp16.*2\]",
    "NVMe": "nothing: its op takes minutes to build",
    "HF Trainer": r"test_hf_trainer.*test_selects.*2-cpu-2\]",
}
# With --whole: a test belongs to the first of these that matches.
WHOLE = {
    "unit": GUARD,
    "HF Trainer": "test_hf_trainer",
    "NVMe": "nvme",
    "skipped steps": "test_overflow",
    "ZeRO-3": r"stage=3|zero3|\[3-",
    "offload": "cpu",
    "ZeRO-1/2": "tests/numerics",
}


def pinned() -> dict[str, str]:
    """constraints.txt, as package -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def known_versions() -> tuple[str, ...]:
    """The releases of DeepSpeed that the guard knows."""
    tree = ast.parse((ROOT / "ds_agsel" / "zero" / "compat" / "versions.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KNOWN_VERSIONS":
            return ast.literal_eval(node.value)
    raise LookupError("KNOWN_VERSIONS")


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # Its own: ops built for another environment are built again for this one, and then again for that one.
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        # DeepSpeed until 0.19.7 imports distutils before setuptools, which replaces it: the NVMe op is not found then.
        "SETUPTOOLS_USE_DISTUTILS": "stdlib" if next(folder.glob("lib/python3.11"), None) else "local",
    }


def tests_of_parts(whole: bool) -> dict[str, list[str]]:
    """The ids of each part's tests, as this environment collects them; of the unit tests the guard's, in any case."""
    what = [*NUMERICS, "tests/frameworks/test_hf_trainer.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow and not device", *what]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    chosen: dict[str, list[str]] = {part: [] for part in QUICK}
    for name in [line for line in found.splitlines() if "::" in line]:
        patterns = WHOLE if whole else QUICK
        part = next((part for part, pattern in patterns.items() if re.search(pattern, name)), None)
        if part is not None:
            chosen[part].append(name)
    return {part: names for part, names in chosen.items() if names} | {"unit": [GUARD]}  # whose ids differ by release


def run_tests(folder: Path, name: str, arguments: list[str]) -> str:
    """Run pytest in the environment ``folder``; its last line, without the time. The log is ``folder``/NAME.log."""
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    found = subprocess.run(
        [*command, "-m", "not slow and not device", *arguments],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True,
    )  # fmt: skip
    (folder / f"{name.replace('/', '-').replace(' ', '-')}.log").write_text(found.stdout + found.stderr)
    last = next((line for line in reversed(found.stdout.splitlines()) if re.search(r"passed|failed|error", line)), "")
    counts = re.sub(r" in [0-9.]+s.*|, \d+ (deselected|warnings?)", "", last.strip("= "))
    return counts if found.returncode == 0 else f"FAILED: {counts}"


def install_release(version: str, folder: Path) -> None:
    """An environment with this one's packages and deepspeed ``version``."""
    if (folder / "installed").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "zz_shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]  # downloads and wheels are in pip's own cache
    subprocess.run([*pip, *options, f"deepspeed=={version}"], check=True)
    (folder / "installed").touch()


def try_environment(name: str, folder: Path, tests: dict[str, list[str]], commit: str) -> dict[str, str]:
    """Each part's outcome in the environment ``folder``, also in its results.json. Raises: see `installed_release`."""
    version = installed_release(folder)
    file = folder / "results.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    results = known.get(commit, {})
    if results.get("import") != "yes":
        code = "import deepspeed, ds_agsel.entry.initialize; print(deepspeed.__version__)"
        command = [str(folder / "bin" / "python"), "-c", code]
        found = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True)
        came = found.returncode == 0 and found.stdout.split()[-1] == version
        results["import"] = "yes" if came else f"FAILED: {(found.stderr or found.stdout).splitlines()[-1:]}"
    for part, chosen in tests.items():
        if not results.get(part, "FAILED").startswith("FAILED"):
            continue
        results[part] = run_tests(folder, part, chosen)
        file.write_text(json.dumps({**known, commit: results}, indent=1))
        print(f"{name:12} {part:14} {results[part]}", flush=True)
    return results


def installed_release(folder: Path) -> str:
    """The release of deepspeed in the environment ``folder``. Raises: CalledProcessError where it has none."""
    code = "import importlib.metadata as m; print(m.version('deepspeed'))"
    found = subprocess.run([str(folder / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def table(results: dict[str, dict[str, str]], whole: bool) -> str:
    """The results as Markdown."""
    columns = ["import", *QUICK]
    lines = [f"| deepspeed | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, parts in results.items():
        lines.append(f"| {name} | {' | '.join(parts.get(column, '-') for column in columns)} |")
    command = "`make compat ARGS=--whole`" if whole else "`make compat`"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{command}, torch {pinned()['torch']}, Python {python} where a row names none:\n\n" + "\n".join(lines)


def install_end(interpreter: str, versions: dict[str, str], folder: Path) -> None:
    """An environment of ``interpreter`` with ``versions``, and the torch and deepspeed of constraints.txt."""
    subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    core = {name: pinned()[name] for name in ("torch", "deepspeed")}
    packages = [f"{name}=={version}" if version else name for name, version in {**core, **versions}.items()]
    subprocess.run([*pip, f"torch=={core['torch']}"], check=True)
    tools = ["ninja", "pytest", "pytest-timeout", "hypothesis", "psutil", "tensorboard", "py-cpuinfo", "datasets"]
    subprocess.run([*pip, *packages, *tools], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    subprocess.run([str(python), "-m", "ds_agsel.zero.build_ops"], cwd=ROOT, env=environment(folder), check=True)
    (folder / "installed").touch()


def install_python(interpreter: str, folder: Path) -> None:
    """As `install_end`, with the newest packages, unless it is there. Where pip has no CPU torch this takes 3 GB."""
    if not (folder / "installed").exists():
        install_end(interpreter, ENDS["newest"], folder)


def check(end: str, versions: dict[str, str], folder: Path) -> tuple[bool, str]:
    """Whether the tests pass with an end's ``versions``, and pytest's last line."""
    install_end(sys.executable, versions, folder)
    last = run_tests(folder, "pytest", TESTS)
    python = [str(folder / "bin" / "python"), "-m", "pip", "freeze"]
    frozen = subprocess.run(python, capture_output=True, text=True, check=True).stdout
    wanted = ("torch", "deepspeed", *versions)
    have = [line for line in frozen.splitlines() if line.split("==")[0].lower() in wanted]
    print(f"{end:7} {last}\n        {', '.join(have)}")
    return not last.startswith("FAILED"), last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "ds_agsel" / "compat")
    parser.add_argument("--ends", nargs="*", default=list(ENDS), choices=list(ENDS))
    parser.add_argument("--versions", nargs="*", default=list(known_versions()), metavar="RELEASE")
    parser.add_argument(
        "--pythons", nargs="*", default=[], metavar="3.N", help="with the newest packages, each in turn"
    )
    parser.add_argument("--whole", action="store_true", help="all tests of the numerics files, not one of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="releases tried at once")
    options = parser.parse_args()
    began = time.monotonic()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    commit += "-whole" if options.whole else ""
    tests = tests_of_parts(options.whole) if options.versions or options.pythons else {}

    def of_release(version: str) -> tuple[str, dict[str, str]]:
        folder = options.cache / version
        install_release(version, folder)
        return version, try_environment(version, folder, tests, commit)

    def of_python(version: str) -> tuple[str, dict[str, str]]:
        folder = options.cache / f"python{version}"
        install_python(f"python{version}", folder)
        name = f"{installed_release(folder)}, Python {version}"
        return name, try_environment(name, folder, tests, commit)

    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(pool.map(of_release, options.versions)) | dict(pool.map(of_python, options.pythons))
    if results:
        print(table(results, options.whole))
    passed = [not any(cell.startswith("FAILED") for cell in cells.values()) for cells in results.values()]
    passed += [check(end, ENDS[end], options.cache / end)[0] for end in options.ends]
    print(f"{time.monotonic() - began:.0f} s; logs: {options.cache}/*/*.log")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
