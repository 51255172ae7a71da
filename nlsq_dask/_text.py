"""Texts of messages: sentences, and lists that are shortened if they are long."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

LINE_LENGTH = 100  # of what is printed


def sentence(text: str) -> str:
    """Return the text with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def wrap(text: str, indent: str = "  ") -> str:
    """Return the text with lines of at most 100 columns, unless a single word is longer.

    Parameters
    ----------
    text : str
        Text, whose own line breaks are kept.
    indent : str
        Text at the beginning of each line that continues another, after the indent of that line.
    """
    lines = []
    for line in text.splitlines():
        own = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line,
            LINE_LENGTH,
            subsequent_indent=own + indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


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
