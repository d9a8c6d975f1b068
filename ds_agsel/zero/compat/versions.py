"""The DeepSpeed releases that this package was tested with, and the error for all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from packaging.version import Version

from ds_agsel.errors import ConfigError

# 0.19.7 and older lack these names: they have no compact gradient partitions, and other offload events.
KNOWN_VERSIONS = ("0.19.8",)


def deepspeed_version() -> str:
    """Return the installed release."""
    return deepspeed.__version__


def is_known() -> bool:
    """Return whether the installed DeepSpeed is a release that this package was tested with."""
    return Version(deepspeed.__version__).base_version in KNOWN_VERSIONS


def refusal(faults: list[str]) -> ConfigError:
    """Return the error that names the installed DeepSpeed, its ``faults``, and the release to install."""
    return ConfigError(
        f"deepspeed=={deepspeed.__version__} does not fit ds_agsel: {'; '.join(faults)}. Known to work: "
        f"{', '.join(KNOWN_VERSIONS)}; install one of them: pip install 'deepspeed=={KNOWN_VERSIONS[-1]}'."
    )


@contextmanager
def imports_of_deepspeed() -> Iterator[None]:
    """Inside, an import that the installed DeepSpeed can't serve raises `refusal` instead of ImportError."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "deepspeed":
            raise
        raise refusal([str(error).split(" (")[0]]) from error
