"""The DeepSpeed releases that this package was tested with, and the error for all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from packaging.version import Version

from ds_agsel.errors import ConfigError

# Oldest first. 0.18.3 and older are refused: 0.17.6 lacks `setup_buckets`, and what came until 0.18.3 is untested.
# tests/compat/run.py tries each of these, and writes the table of docs/frameworks.md.
KNOWN_VERSIONS = (
    "0.18.4", "0.18.5", "0.18.6", "0.18.7", "0.18.8", "0.18.9",
    "0.19.0", "0.19.1", "0.19.2", "0.19.3", "0.19.4", "0.19.5", "0.19.6", "0.19.7", "0.19.8",
)  # fmt: skip
# What pyproject.toml leaves out. A release between the newest known one and this is taken if the guard finds no fault.
TOO_NEW = "0.20"


def deepspeed_version() -> str:
    """Return the installed release."""
    return deepspeed.__version__


def installed() -> Version:
    """Return the installed release without its local part: "0.18.9" for "0.18.9+cu128"."""
    return Version(Version(deepspeed.__version__).base_version)


def until(newest: str) -> bool:
    """Return whether the installed DeepSpeed is release ``newest`` or an older one."""
    return installed() <= Version(newest)


def is_known() -> bool:
    """Return whether the installed DeepSpeed is a release that this package was tested with."""
    return str(installed()) in KNOWN_VERSIONS


def refusal(faults: list[str]) -> ConfigError:
    """Return the error that names the installed DeepSpeed, its ``faults``, and the release to install."""
    return ConfigError(
        f"deepspeed=={deepspeed.__version__} does not fit ds_agsel: {'; '.join(faults)}. Known to work: "
        f"{KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]}; install one of them: pip install "
        f"'deepspeed=={KNOWN_VERSIONS[-1]}'."
    )


def require_supported() -> None:
    """Raise ConfigError for a release that is too old or too new, before anything of it is imported."""
    if installed() < Version(KNOWN_VERSIONS[0]):
        raise refusal(["it is too old"])
    if installed() >= Version(TOO_NEW):
        raise refusal(["it is newer than any release that was tried"])


@contextmanager
def imports_of_deepspeed() -> Iterator[None]:
    """Inside, an import that the installed DeepSpeed can't serve raises `refusal` instead of ImportError."""
    require_supported()
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "deepspeed":
            raise
        raise refusal([str(error).split(" (")[0]]) from error
