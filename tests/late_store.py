"""A Zarr store that waits before each answer; imported by workers, which count their requests."""

from __future__ import annotations

import asyncio
from typing import Any

from zarr.abc.store import Store
from zarr.storage import WrapperStore

_running = _peak = _count = 0


def reset() -> None:
    """Forget the requests so far."""
    global _peak, _count
    _peak = _count = 0


def requests() -> tuple[int, int]:
    """Return how many requests ran at the same time in this process, and how many there were."""
    return _peak, _count


class LateStore(WrapperStore[Store]):
    """A store that waits before each answer."""

    def __init__(self, store: Store, seconds: float) -> None:
        super().__init__(store)
        self._seconds = seconds

    def _with_store(self, store: Store) -> LateStore:
        return type(self)(store, self._seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self._seconds)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return a value after a while."""
        global _running, _peak, _count
        _running += 1
        _count += 1
        _peak = max(_peak, _running)
        await asyncio.sleep(self._seconds)
        _running -= 1
        return await self._store.get(key, prototype, byte_range)
