"""What the contract names and is not built yet: refused, never accepted and ignored."""

from __future__ import annotations

from collections.abc import Callable

from nlsq_dask.config import HybridStreamingConfig

_NOT_BUILT: tuple[tuple[str, Callable[[HybridStreamingConfig], bool]], ...] = (
    ("log_file", lambda c: c.log_file is not None),
)


def refuse_unbuilt(config: HybridStreamingConfig) -> None:
    """Raise NotImplementedError if something is asked for that is not built yet."""
    asked = [name for name, is_asked in _NOT_BUILT if is_asked(config)]
    if asked:
        raise NotImplementedError(
            f"{', '.join(asked)}: not built yet in this version of nlsq_dask. Leave it at its "
            f"default."
        )
