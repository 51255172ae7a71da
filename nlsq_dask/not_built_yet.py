"""What the contract names and is not built yet: refused, never accepted and ignored."""

from __future__ import annotations

from collections.abc import Callable

from nlsq_dask.config import HybridStreamingConfig

_NOT_BUILT: tuple[tuple[str, Callable[[HybridStreamingConfig], bool]], ...] = (
    ("enable_fault_tolerance=False", lambda c: not c.enable_fault_tolerance),
    ("max_retries_per_batch other than 2", lambda c: c.max_retries_per_batch != 2),
    ("min_success_rate below 1", lambda c: c.min_success_rate < 1.0),
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
