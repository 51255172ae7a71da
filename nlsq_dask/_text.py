"""Text in messages."""

from __future__ import annotations

from collections.abc import Sequence


def join_first(texts: Sequence[str], most: int = 20, separator: str = ", ", noun: str = "") -> str:
    """Join the first ``most`` texts and the number of the others.

    Parameters
    ----------
    texts : sequence of str
    most : int
    separator : str
    noun : str
        What the others are, in the plural.

    Examples
    --------
    >>> join_first(["a", "b", "c", "d"], 2, noun="parameters")
    'a, b, and 2 more parameters'
    """
    n_more = len(texts) - most
    if n_more > 0:
        texts = [*texts[:most], f"and {n_more:,} more {noun}".rstrip()]
    return separator.join(texts)
