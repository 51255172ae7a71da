"""HTML fragments for notebooks, readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_PAD = "padding:0.15em 0.9em 0.15em 0.2em"
_LEFT, _RIGHT = f"text-align:left;{_PAD}", f"text-align:right;{_PAD}"
# Pairs of background and text color.
GOOD, BAD, CAUTION = ("#1b7837", "#ffffff"), ("#b2182b", "#ffffff"), ("#f1a340", "#000000")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 1) -> str:
    """Return an HTML table with a header and rows of text.

    The first ``n_left`` columns and the last one are left-aligned; the columns between them are
    right-aligned, for numbers.
    """
    last = len(header) - 1

    def cells(tag: str, texts: Sequence[str]) -> str:
        aligned = (_LEFT if i < n_left or i == last else _RIGHT for i in range(len(texts)))
        pairs = zip(texts, aligned, strict=True)
        return "".join(f"<{tag} style='{style}'>{escape(text)}</{tag}>" for text, style in pairs)

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table with one name and its value per row."""
    rows = "".join(
        f"<tr><th style='{_LEFT}'>{escape(name)}</th><td style='{_LEFT}'>{escape(text)}</td></tr>"
        for name, text in pairs
    )
    return f"<table><tbody>{rows}</tbody></table>"


def badge(text: str, colors: tuple[str, str]) -> str:
    """Return a text on a colored background as HTML; ``colors`` are background and text."""
    background, color = colors
    return (
        f"<span style='background:{background};color:{color};border-radius:0.3em;"
        f"padding:0.15em 0.6em;font-weight:bold'>{escape(text)}</span>"
    )


def paragraph(*parts: str) -> str:
    """Join HTML fragments into one paragraph."""
    return f"<p style='margin:0.4em 0'>{' '.join(parts)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """Return an HTML list with one bullet per text; an empty string if there are no texts."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul style='margin:0.2em 0'>{items}</ul>" if items else ""


def plan(problems: Sequence[str], lines: Iterable[tuple[str, str]]) -> str:
    """Return the page of a plan: its problems, and one name and value per row."""
    n = len(problems)
    text = f"{n} problem{'s' if n > 1 else ''}" if n else "no problems"
    return page(
        paragraph(badge(text, CAUTION if n else GOOD)),
        bullets(problems),
        facts(lines),
    )


def collapsed(title: str, body: str, is_open: bool = False) -> str:
    """Return an HTML section that shows or hides ``body`` when its title is clicked."""
    state = " open" if is_open else ""
    style = "margin:0.3em 0"
    return (
        f"<details style='{style}'{state}><summary style='cursor:pointer'>{escape(title)}</summary>"
        f"{body}</details>"
    )


def page(*parts: str) -> str:
    """Join HTML fragments into one block element."""
    return f"<div>{''.join(parts)}</div>"
