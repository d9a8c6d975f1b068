"""The DeepSpeed releases that this package was tested with."""

from __future__ import annotations

import deepspeed
from packaging.version import Version

# 0.19.7 and older have no compact gradient partitions, and other offload events, under these names.
KNOWN_VERSIONS = ("0.19.8",)


def deepspeed_version() -> str:
    """The installed release."""
    return deepspeed.__version__


def is_known() -> bool:
    """Whether the installed DeepSpeed is a release that this package was tested with."""
    return Version(deepspeed.__version__).base_version in KNOWN_VERSIONS
