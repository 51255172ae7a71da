"""Texts of messages: sentences, and lists that are shortened if they are long."""

from __future__ import annotations

from collections.abc import Sequence


def sentence(text: str) -> str:
    """Return the text with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


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
