"""`make compat`: the oldest and the newest framework versions that we claim, each in an environment of its own.

Prints a table of versions and outcomes; exits with 1 where any failed. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
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


def pinned() -> dict[str, str]:
    """constraints.txt, as package -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def check(end: str, versions: dict[str, str], folder: Path) -> tuple[bool, str]:
    """Whether the tests pass with ``versions``, and pytest's last line."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    core = {name: pinned()[name] for name in ("torch", "deepspeed")}
    packages = [f"{name}=={version}" if version else name for name, version in {**core, **versions}.items()]
    subprocess.run([*pip, f"torch=={core['torch']}"], check=True)
    tools = ["ninja", "pytest", "pytest-timeout", "hypothesis", "psutil", "tensorboard", "py-cpuinfo", "datasets"]
    subprocess.run([*pip, *packages, *tools], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        # Its own: ops built for another environment are built again for this one, and then again for that one.
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
    subprocess.run([str(python), "-m", "ds_agsel.zero.build_ops"], cwd=ROOT, env=environment, check=True)
    found = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not device", *TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    (folder / "pytest.log").write_text(found.stdout + found.stderr)
    last = next((line for line in reversed(found.stdout.splitlines()) if re.search(r"passed|failed|error", line)), "")
    frozen = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    wanted = ("torch", "deepspeed", *versions)
    have = [line for line in frozen.splitlines() if line.split("==")[0].lower() in wanted]
    print(f"{end:7} {'passed' if found.returncode == 0 else 'FAILED'}  {last.strip('= ')}\n        {', '.join(have)}")
    return found.returncode == 0, last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "ds_agsel" / "compat")
    parser.add_argument("--ends", nargs="+", default=list(ENDS), choices=list(ENDS))
    options = parser.parse_args()
    began = time.monotonic()
    passed = [check(end, ENDS[end], options.cache / end)[0] for end in options.ends]
    print(f"{time.monotonic() - began:.0f} s; logs: {options.cache}/*/pytest.log")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
