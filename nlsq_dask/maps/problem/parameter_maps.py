"""Initial values, bounds and fixed values of parameters, some of which vary over the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.fit.arguments.numbers import reject_unknown
from nlsq_dask.fit.arguments.parameters import Parameters

Array = NDArray[Any]
Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class Role(NamedTuple):
    """Kind of the values of a map."""

    kind: str  # "start", "low", "high" or "fixed"
    name: str  # of the parameter

    @property
    def text(self) -> str:
        """The map in messages."""
        bound = f"bounds[{self.name!r}]"
        words = {
            "start": f"p0[{self.name!r}]",
            "low": f"{bound}[0]",
            "high": f"{bound}[1]",
            "fixed": f"fixed[{self.name!r}]",
        }
        return words[self.kind]


Maps = dict[Role, Any]


@dataclass
class Separated:
    """The arguments p0, bounds and fixed, with the maps in them taken out."""

    p0: Any
    bounds: Any
    fixed: Any
    maps: Maps = field(default_factory=dict)

    @classmethod
    def of(cls, p0: Any, bounds: Any, fixed: Any, ties: Any = None) -> Separated:
        """Take the maps out of the arguments of ``fit_each``."""
        if isinstance(p0, xr.DataArray) and "param" in p0.coords and p0.ndim > 1:
            numbers, tied = (a if isinstance(a, Mapping) else {} for a in (fixed, ties))
            given = {name for name, value in numbers.items() if not is_map(value)} | set(tied)
            p0 = {n: p0.sel(param=n, drop=True) for n in p0["param"].values if n not in given}
        own = cls(p0, bounds, fixed)
        if isinstance(p0, Mapping):
            own.p0 = own._without_maps(p0, "start")
        if isinstance(fixed, Mapping):
            own.fixed = own._without_maps(fixed, "fixed")
        if isinstance(bounds, Mapping):
            own.bounds = {name: own._pair(name, pair) for name, pair in bounds.items()}
        elif _is_pair(bounds):
            sides = zip(bounds, ("low", "high"), strict=True)
            own.bounds = tuple(
                own._without_maps(side, kind) if isinstance(side, Mapping) else side
                for side, kind in sides
            )
        return own

    def _without_maps(self, values: Mapping[str, Any], kind: str) -> dict[str, Any]:
        rest = {}
        for name, value in values.items():
            if is_map(value):
                self.maps[Role(kind, name)] = value
            else:
                rest[name] = _number(value)
        return rest

    def _pair(self, name: str, pair: Any) -> Any:
        if not _is_pair(pair):
            return pair
        infinite = {"low": -np.inf, "high": np.inf}
        sides = zip(pair, infinite.items(), strict=True)
        return tuple(
            self._without_maps({name: side}, kind).get(name, none) for side, (kind, none) in sides
        )


def is_map(value: Any) -> bool:
    """Return whether a value of a parameter is an array with at least one dimension."""
    return hasattr(value, "dtype") and np.ndim(value) > 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _number(value: Any) -> Any:
    return value.values.item() if isinstance(value, xr.DataArray) else value


def check_maps(maps: Maps, parameters: Parameters) -> None:
    """Raise a ValueError for a map of an unknown, fixed or tied parameter."""
    names, transform = parameters.names, parameters.transform
    for role in maps:
        argument = role.text.partition("[")[0]
        reject_unknown([role.name], names, argument)
        if not transform.is_free[names.index(role.name)]:
            raise ValueError(
                f"{role.text} is a map, but {role.name!r} is tied, or fixed by a number for all "
                f"pixels. Leave it out of one of the arguments."
            )
    for role in maps:
        others = [Role(kind, role.name) for kind in ("low", "high")]
        if role.kind == "fixed" and any(other in maps for other in others):
            raise ValueError(
                f"{role.text} and bounds[{role.name!r}] are both maps. Pass one of them: equal "
                f"bounds fix a parameter at some pixels."
            )


@dataclass(frozen=True)
class ParameterMaps:
    """Start, bounds and fixed values of the p free parameters."""

    start: Vector  # shape (p,)
    low: Vector
    high: Vector
    roles: tuple[tuple[str, int], ...]  # kind and index of the parameter of each map

    @classmethod
    def of(cls, parameters: Parameters, maps: Maps) -> ParameterMaps:
        """Return them for the free ones among all parameters."""
        free = parameters.free
        roles = tuple((role.kind, free.names.index(role.name)) for role in maps)
        return cls(free.start, free.low, free.high, roles)

    def at_pixels(self, maps: Sequence[Array]) -> tuple[Matrix, Matrix, Matrix]:
        """Return start, lower and upper bounds of m pixels, each of shape (p, m) or (p, 1).

        A parameter is fixed where its bounds are equal. Where its fixed value is outside its
        bounds, the lower one exceeds the upper one. ``maps`` have shape (m,), in the order of
        ``roles``.
        """
        by_role = dict(zip(self.roles, maps, strict=True))
        start, low, high = (vector[:, None].copy() for vector in (self.start, self.low, self.high))
        values = {"start": start, "low": low, "high": high}
        for (kind, i), array in by_role.items():
            if kind in values:
                values[kind] = _with_row(values[kind], i, array)
        start, low, high = values["start"], values["low"], values["high"]
        for (kind, i), array in by_role.items():
            if kind != "fixed":
                continue
            is_flag = array.dtype.kind == "b"
            is_fixed = array if is_flag else np.ones(array.shape, bool)
            value = np.broadcast_to(start[i], array.shape) if is_flag else array
            start = _with_row(start, i, np.where(is_fixed, value, start[i]))
            low = _with_row(low, i, np.where(is_fixed, np.maximum(value, low[i]), low[i]))
            high = _with_row(high, i, np.where(is_fixed, np.minimum(value, high[i]), high[i]))
        return start, low, high


def _with_row(values: Matrix, i: int, row: Array) -> Matrix:
    """Return values of shape (p, m) or (p, 1) as shape (p, m), with one row replaced."""
    whole = np.broadcast_to(values, (len(values), len(row))).copy()
    whole[i] = row
    return whole
