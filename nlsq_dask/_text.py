"""Joining of texts to a list in a message, which is shortened if it is long."""

from __future__ import annotations

from collections.abc import Sequence


def join_first(texts: Sequence[str], most: int = 20, separator: str = ", ", noun: str = "") -> str:
    """Join texts; after the first ``most`` of them, only say how many more there are.

    Parameters
    ----------
    texts : sequence of str
    most : int
        Maximum number of texts to list.
    separator : str
        Text between two texts.
    noun : str
        Plural noun for the texts that are not listed, such as "parameters".

    Examples
    --------
    >>> join_first(["a", "b", "c", "d"], 2, noun="parameters")
    'a, b, and 2 more parameters'
    """
    n_more = len(texts) - most
    if n_more > 0:
        texts = [*texts[:most], f"and {n_more:,} more {noun}".rstrip()]
    return separator.join(texts)
