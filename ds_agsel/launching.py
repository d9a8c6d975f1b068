"""The commands behind `ds-agsel train` and `ds-agsel evaluate`.

An installed wheel has the code of the repository's folder launch/ as the package ``ds_agsel.launch``. A clone has it as
launch/, beside ds_agsel/. Both work.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_agsel.errors import ConfigError

PACKAGE = "ds_agsel.launch"
# The options of the launcher `deepspeed` (0.19.8), wherever they stand among those of training; a test compares them
# with the launcher's own.
LAUNCHER_OPTIONS = frozenset(
    {
        "-H", "--hostfile", "-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators",
        "--master_port", "--master_addr", "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log",
        "--autotuning", "--bind_core_list", "--ssh_port", "--venv_script", "--log_level",
    }
)  # fmt: skip
LAUNCHER_FLAGS = frozenset(
    {
        "--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid", "--bind_cores_to_rank", "-q",
        "--quiet",
    }
)  # fmt: skip
_ANSWERED_AT_ONCE = frozenset({"-h", "--help", "--version"})


def train_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that trains with ``arguments``, options of the launcher among them.

    Raises ConfigError if this installation has no launch code.
    """
    to_launcher, to_training = split(arguments)
    if _ANSWERED_AT_ONCE & set(to_training):
        return [sys.executable, *_script("train", "-m"), *to_training]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *to_launcher,
        *_script("train", "--module"),
        *to_training,
    ]


def evaluate_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that evaluates with ``arguments``. Raises ConfigError as `train_command` does."""
    return [sys.executable, *_script("evaluate", "-m"), *arguments]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the launcher's options among ``arguments``, and the others, each in their order."""
    to_launcher: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name in LAUNCHER_FLAGS:
            to_launcher.append(word)
        elif name in LAUNCHER_OPTIONS:
            to_launcher.append(word)
            if not value:
                to_launcher += [follows for follows in [next(words, None)] if follows is not None]
        else:
            others.append(word)
    return to_launcher, others


def _script(name: str, module_option: str) -> list[str]:
    """Return the words that start launch/``name``.py: as a module if it is installed, else by its path in the clone."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return [module_option, f"{PACKAGE}.{name}"]
    clone = Path(__file__).resolve().parents[1]
    script = clone / "launch" / f"{name}.py"
    if script.is_file() and (clone / "ds_agsel" / "launching.py").is_file() and (clone / "pyproject.toml").is_file():
        return [str(script)]
    raise ConfigError(
        f"This installation of ds_agsel has no launch code beside {clone}. Install the wheel, or a clone."
    )
