"""``ValidatedOptions``: a dataclass whose fields have rules for their values."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Self

from nlsq_dask._keywords import suggest_keyword
from nlsq_dask.config.rules import Rule


def runtime_option(default: Any, rule: Rule) -> Any:
    """Declare an option that does not change the result and may differ when a fit is resumed."""
    return option(default, rule, changes_fit=False)


def option(default: Any, rule: Rule, changes_fit: bool = True) -> Any:
    """Declare a field of a dataclass, with its default and the rule for its values.

    Parameters
    ----------
    default : value
    rule : Rule
    changes_fit : bool
        Whether the option changes the result of a fit. Such an option must have the same value when
        the fit is resumed.
    """
    metadata = {"rule": rule, "changes_fit": changes_fit}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(option: Field[Any]) -> Any:
    """Return the default value of an option."""
    return option.default if option.default_factory is MISSING else option.default_factory()


@dataclass(kw_only=True, repr=False)
class ValidatedOptions:
    """Dataclass whose fields, declared by ``option``, have rules for their values."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option, not yet validated; raise an AttributeError if it does not exist."""
        option = self.__dataclass_fields__.get(name)
        if option is None:
            sentence = f"{type(self).__name__} has no option {name!r}. {suggest_keyword(name)}"
            raise AttributeError(sentence.rstrip())
        rule: Rule = option.metadata["rule"]
        super().__setattr__(name, rule.kept(value) if rule.test(value) else value)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, rule = getattr(self, option.name), option.metadata["rule"]
            if not rule.test(value):
                raise ValueError(f"{option.name} must be {rule.allowed}; got {value!r}.")

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.changed().items())
        return f"{type(self).__name__}({options})"

    def changed(self) -> dict[str, Any]:
        """Return the options whose values differ from the defaults.

        Examples
        --------
        >>> from nlsq_dask import HybridStreamingConfig
        >>> HybridStreamingConfig(cache=0).changed()
        {'cache': 0}
        """
        values = {option: getattr(self, option.name) for option in fields(self)}
        return {o.name: value for o, value in values.items() if value != default_of(o)}

    def validated_copy(self) -> Self:
        """Return a copy; raise a ValueError if a value is not allowed."""
        return replace(self)
