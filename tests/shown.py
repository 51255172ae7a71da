"""Which test shows what an option or argument does; a name without a test is an error."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., None])


class Shown:
    """Names, each with the one test that shows what it does.

    Parameters
    ----------
    file : str
        Test file whose tests are registered by the decorator ``shows``.
    names : iterable of str
        All names that need a test.
    elsewhere : dict by name of str
        Tests in other files, as ``"tests/test_file.py::test_name"``.
    not_yet : dict by name of str
        Why names have no test.
    """

    def __init__(
        self,
        file: str,
        names: Iterable[str],
        elsewhere: Mapping[str, str],
        not_yet: Mapping[str, str],
    ) -> None:
        self._file, self._names = file, list(names)
        self._entries = [*elsewhere.items()]
        self._entries += [(name, f"NOT YET: {reason}") for name, reason in not_yet.items()]

    def shows(self, *names: str) -> Callable[[Test], Test]:
        """Record that a test shows what these names do."""

        def record(test: Test) -> Test:
            self._entries += [(name, f"{self._file}::{test.__name__}") for name in names]
            return test

        return record

    def table(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Return all names, each with its test or the reason for none, and those with neither.

        A name that is listed twice or does not exist is among the latter, too.
        """
        tests, counts = dict(self._entries), Counter(name for name, _ in self._entries)
        wrong = [name for name in self._names if counts[name] != 1]
        wrong += [name for name in counts if name not in self._names]
        return [(name, tests.get(name, "NO TEST")) for name in self._names], wrong


def assert_is_there(name: str, test: str) -> None:
    """Fail unless a test of another file exists, and the file mentions the name."""
    path, function = test.split("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(getattr(module, function))
    assert name in inspect.getsource(module)
