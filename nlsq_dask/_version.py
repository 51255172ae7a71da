"""The version of the package, for a source tree that is not installed as well."""

from __future__ import annotations

from importlib.metadata import version

__version__ = "0.1.0"


def version_of(package: str) -> str:
    """Return the version of this package or of an installed one."""
    return __version__ if package == "nlsq-dask" else version(package)
