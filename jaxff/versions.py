"""Versions of what made a number, for result files."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from jaxff import __version__


def installed(*packages: str) -> dict[str, str]:
    """Version of each of the packages that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def versions_with(*packages: str) -> dict[str, str]:
    """Python, jaxff and `packages`; "not installed" where one isn't."""
    own = {"python": platform.python_version(), "jaxff": __version__}
    return own | dict.fromkeys(packages, "not installed") | installed(*packages)
