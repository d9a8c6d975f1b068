"""The versions that a result depends on. Light: package metadata alone, nothing is imported."""

from __future__ import annotations

import importlib.metadata
import platform

FRAMEWORKS = ("deepspeed", "torch", "transformers", "datasets")


def installed(*packages: str) -> dict[str, str]:
    """Return the installed version of each of ``packages``, by default of `FRAMEWORKS`.

    Keys are spelt as modules are, "math_verify". Packages that are not installed are left out.
    """
    found = {}
    for name in packages or FRAMEWORKS:
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def of_a_run(*more: str) -> dict[str, str]:
    """Return Python's version, ours, those of `FRAMEWORKS`, and of the packages ``more``."""
    from ds_agsel import __version__

    return {"python": platform.python_version(), "ds_agsel": __version__, **installed(*FRAMEWORKS, *more)}


def in_words() -> str:
    """Return one line for ``--version``."""
    return ", ".join(f"{name} {version}" for name, version in of_a_run().items())
