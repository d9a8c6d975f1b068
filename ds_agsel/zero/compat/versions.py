"""The DeepSpeed releases that this package was tested with, and the error for all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from packaging.version import Version

from ds_agsel.errors import ConfigError

# Oldest first. tests/compat/run.py tries each of these.
KNOWN_VERSIONS = ("0.18.4", "0.18.9", "0.19.5", "0.19.8")
# What pyproject.toml leaves out, as well as what is older than all of them. Another release between these bounds is
# taken, with a warning, if the guard finds no fault.
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
        f"{', '.join(KNOWN_VERSIONS)}; install one of them: pip install 'deepspeed=={KNOWN_VERSIONS[-1]}'."
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
