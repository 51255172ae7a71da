"""Rules for the values of options, and for combinations of options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from nlsq_dask.config.options import HybridStreamingConfig


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python number; return other values unchanged."""
    return value.item() if isinstance(value, np.generic) else value


class Rule(NamedTuple):
    """Rule for the value of an option."""

    allowed: str  # allowed values in words, for messages
    test: Callable[[Any], bool]  # whether a value is allowed
    kept: Callable[[Any], Any] = _plain  # converts an allowed value to the form that is stored


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def _is_finite(value: Any) -> bool:
    return _is_real(value) and abs(value) <= sys.float_info.max


def integer(low: int, high: int | None = None) -> Rule:
    """Return a rule that allows integers >= ``low``, and <= ``high`` if it is given."""
    allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    return Rule(allowed, lambda v: _is_int(v) and low <= v <= (v if high is None else high))


def or_else(other: Rule, *values: object) -> Rule:
    """Return a rule that allows what ``other`` allows, and values such as None or "auto"."""
    names = ", ".join(map(repr, values))

    def is_special(value: Any) -> bool:
        return any(value is x or (isinstance(value, str) and value == x) for x in values)

    return Rule(
        f"{other.allowed}, or {names}",
        lambda v: is_special(v) or other.test(v),
        lambda v: v if is_special(v) else other.kept(v),
    )


def one_of(*values: str) -> Rule:
    """Return a rule that allows the given strings."""
    allowed = f"one of {', '.join(map(repr, values))}"
    return Rule(allowed, lambda v: isinstance(v, str) and v in values)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _index_ranges(value: Any) -> bool:
    return _is_sequence(value) and all(
        _is_sequence(pair) and len(pair) == 2 and all(map(_is_int, pair)) and 0 <= pair[0] < pair[1]
        for pair in value
    )


def _weights(value: Any) -> bool:
    if not _is_sequence(value) and getattr(value, "ndim", 0) != 1:
        return False
    return len(value) > 0 and all(_is_finite(weight) and weight > 0 for weight in value)


BOOL = Rule("True or False", _is_bool)
# Infinity is a valid limit, but not a valid size or factor.
POSITIVE = Rule("a number > 0", lambda v: _is_real(v) and v > 0)
NON_NEGATIVE = Rule("a number >= 0", lambda v: _is_real(v) and v >= 0)
FINITE_POSITIVE = Rule("a finite number > 0", lambda v: _is_finite(v) and v > 0)
FINITE_NON_NEGATIVE = Rule("a finite number >= 0", lambda v: _is_finite(v) and v >= 0)
TOLERANCE = Rule("a number > 0 and < 1", lambda v: _is_real(v) and 0 < v < 1)
FRACTION = Rule("a number > 0 and <= 1", lambda v: _is_real(v) and 0 < v <= 1)
PATH = Rule("a path (str or os.PathLike)", lambda v: isinstance(v, str | os.PathLike))
PATH_OR_FLAG = Rule(
    "a path (str or os.PathLike), True, False or None",
    lambda v: v is None or _is_bool(v) or PATH.test(v),
)
_CRITERION = one_of("plateau", "gradient", "max_iter")
CRITERIA = Rule(
    "a non-empty list of 'plateau', 'gradient', 'max_iter'",
    lambda v: _is_sequence(v) and len(v) > 0 and all(map(_CRITERION.test, v)),
)
RANGES = Rule("a list of pairs (start, end), 0 <= start < end", _index_ranges)
WEIGHTS = Rule(
    "a sequence of finite numbers > 0, one per group",
    _weights,
    lambda v: tuple(map(float, v)),  # comparable, unlike an array
)

# Switches that require another option.
_NEEDS = {
    "enable_group_variance_regularization": "group_variance_indices",
    "enable_residual_weighting": "residual_weights",
}


def check_combinations(options: HybridStreamingConfig) -> None:
    """Raise a ValueError if options contradict each other."""
    for switch, needed in _NEEDS.items():
        value = getattr(options, needed)
        if getattr(options, switch) and value is None:
            raise ValueError(f"{switch}=True requires {needed}; got None.")
        if value is not None and not getattr(options, switch):
            raise ValueError(f"{needed}={value!r} requires {switch}=True.")
    if options.min_success_rate < 1.0 and not options.enable_fault_tolerance:
        raise ValueError(
            f"min_success_rate={options.min_success_rate!r} allows unreadable blocks to be "
            f"skipped, which requires enable_fault_tolerance=True. Set it, or min_success_rate=1.0."
        )
    if options.resume_from_checkpoint is True:
        if options.checkpoint_dir is None:
            raise ValueError(
                "resume_from_checkpoint=True resumes from checkpoint_dir, which is None. Set "
                "checkpoint_dir as well, or pass the path of a checkpoint instead of True."
            )
        if not options.enable_checkpoints:
            raise ValueError(
                "resume_from_checkpoint=True requires enable_checkpoints=True. To resume without "
                "writing checkpoints, pass the path of a checkpoint instead of True."
            )
