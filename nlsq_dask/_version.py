"""The version of this package, also where its source code is used without installation."""

from __future__ import annotations

from importlib.metadata import version

__version__ = "0.2.0"


def version_of(package: str) -> str:
    """Return the version of this package, which need not be installed, or of an installed one."""
    return __version__ if package == "nlsq-dask" else version(package)
