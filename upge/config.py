"""Settings as dataclasses: each field states its default, range and meaning, and text becomes a value in one place.

    @dataclass(frozen=True)
    class StopConfig(Settings):
        nonfinite_updates: int = key(5, "stop after N non-finite updates in a row", minimum=1)

`from_tree` builds such a class from nested mappings. `defaults` and `meanings` list its fields for configuration files
and help texts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from upge.checks import mismatch
from upge.errors import ConfigError, Problems, nearest
from upge.trees import DEEPEST, check_yaml, first_line, plain

#: Old → new dotted names of renamed settings.
RENAMED_KEYS = {"data_policy.demonstrated": "data_policy.demonstrated_prompts"}


@dataclass(frozen=True)
class Range:
    """The allowed range of a numeric setting.

    Attributes:
        minimum, maximum: inclusive bounds; None = unbounded.
        above, below: exclusive bounds; None = unbounded.
        limit: the largest value that can be handled at all, far beyond any use; None = no such limit.
        fix: what to do instead, for the message; empty = a sentence made from the bounds.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    limit: float | None = None
    fix: str = ""

    def problem(self, value: float) -> str | None:
        """None if `value` lies in the range, else a message with the value and the fix."""
        if self.limit is not None and value > self.limit:
            return f"found {value}; it must be at most {self.limit}"
        low = self.minimum is None or value >= self.minimum
        low = low and (self.above is None or value > self.above)
        high = self.maximum is None or value <= self.maximum
        high = high and (self.below is None or value < self.below)
        return None if low and high else f"found {value}; {self.fix or self._rule()}"

    def describe(self) -> str:
        """The bounds in words; empty if there are none."""
        bounds = self.minimum, self.maximum, self.above, self.below
        if all(bound is None for bound in bounds):
            return "" if self.limit is None else f"at most {self.limit:g}"
        rule = self._rule().removeprefix("it must ")
        return rule.removeprefix("be ").replace("lie in", "in").replace("not be negative", "not negative")

    def _rule(self) -> str:
        lowest = self.minimum if self.above is None else self.above
        highest = self.maximum if self.below is None else self.below
        if lowest is not None and highest is not None:
            left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"it must lie in {left}{lowest:g}, {highest:g}{right}"
        if self.above is not None:
            return f"it must be greater than {self.above:g}"
        if self.minimum is not None:
            return f"it must be at least {self.minimum:g}" if self.minimum else "it must not be negative"
        return f"it must be at most {highest:g}" if self.below is None else f"it must be less than {highest:g}"


def key(default: Any, meaning: str, aliases: Mapping[str, Any] | None = None, **allowed: Any) -> Any:
    """A field of a settings class.

    Args:
        default: the default value; a dict or a list is copied for each instance.
        meaning: one line of help.
        aliases: other values that `from_tree` accepts, as lower-case text, and what each stands for.
        **allowed: the fields of the `Range` of a number.
    """
    metadata = {"meaning": meaning, "aliases": aliases or {}, "range": Range(**allowed)}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A field that holds a nested group of settings."""
    return field(default_factory=cls)


@dataclass(frozen=True)
class Settings:
    """Base of settings classes. Its constructor checks the range of every number.

    Raises:
        ConfigError: a number is out of range. The error's key is the field's name; `from_tree` prefixes the path.
    """

    def __post_init__(self) -> None:
        problems = Problems()
        for item in dataclasses.fields(self):
            with problems:
                _check_range(item, getattr(self, item.name), item.name)
        problems.raise_any()


def _check_range(item: dataclasses.Field, value: Any, where: str) -> None:
    """Refuse a number outside the range of its field."""
    if "range" in item.metadata and isinstance(value, (int, float)) and not isinstance(value, bool):
        if problem := item.metadata["range"].problem(value):
            raise ConfigError(problem, where)


def from_tree(cls: type, tree: Mapping[str, Any], path: str = "") -> Any:
    """Build the dataclass `cls` from nested mappings.

    Args:
        cls: a dataclass whose fields are made by `key` and `section`.
        tree: its settings; missing ones get their defaults.

    Raises:
        ConfigError: a key is unknown (the message gives the nearest known one), or a value has the wrong type or is
            out of range; `ConfigErrors` if several are.
    """
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    values, problems = {}, Problems()
    for name, value in tree.items():
        where = f"{path}.{name}" if path else str(name)
        with problems:
            if name not in hints:
                renamed = RENAMED_KEYS.get(where)
                hint = f"it was renamed; write {renamed}" if renamed else nearest(str(name), hints)
                raise ConfigError(f"unknown key; {hint}", where)
            values[name] = _typed(hints[name], value, fields[name], where)
    problems.raise_any()
    try:
        return cls(**values)
    except ConfigError as error:
        raise (error.under(path) if path else error) from None


def _typed(kind: Any, value: Any, item: dataclasses.Field, where: str) -> Any:
    """The value of a field of type `kind`, checked against the type and the field's range."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            inner = ", ".join(f.name for f in dataclasses.fields(kind))
            raise ConfigError(f"found {value!r}, expected keys such as {where}.KEY: {inner}", where)
        return from_tree(cast("type", kind), value, where)
    value = item.metadata.get("aliases", {}).get(str(value).lower(), value)
    wrong = mismatch(value, kind)
    if wrong:
        raise ConfigError(wrong, where)
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"found {value}; give a finite number", where)
    value = float(value) if kind is float else value
    _check_range(item, value, where)
    return value


def defaults(cls: type) -> dict[str, Any]:
    """The tree of default values."""
    return dataclasses.asdict(cls())


@dataclass(frozen=True)
class Setting:
    """A field of a settings class.

    Attributes:
        name: its dotted key.
        kind: its annotated type.
    """

    name: str
    default: Any
    meaning: str
    kind: Any
    range: Range

    @property
    def values(self) -> tuple[str, ...]:
        """Its values as typed on the command line, if they can be listed."""
        if self.kind is bool:
            return "true", "false"
        return tuple(map(str, get_args(self.kind))) if get_origin(self.kind) is Literal else ()

    @property
    def allowed(self) -> str:
        """Its values in words."""
        if self.values:
            return ", ".join(self.values[:-1]) + f" or {self.values[-1]}"
        kinds = {int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a mapping"}
        return ", ".join(filter(None, [kinds.get(self.kind, str(self.kind)), self.range.describe()]))


def settings(cls: type, path: str = "") -> list[Setting]:
    """Every setting of a settings class and of its sections, in order."""
    rows: list[Setting] = []
    hints, instance = get_type_hints(cls), cls()
    for item in dataclasses.fields(cls):
        kind, name = hints[item.name], f"{path}{item.name}"
        if dataclasses.is_dataclass(kind):
            rows += settings(cast("type", kind), f"{name}.")
        else:
            data = item.metadata
            rows.append(Setting(name, getattr(instance, item.name), data["meaning"], kind, data["range"]))
    return rows


def meanings(cls: type, path: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every setting, in order."""
    return [(one.name, one.default, one.meaning) for one in settings(cls, path)]


def split(argument: str) -> tuple[str, str]:
    """The key and the text of `key=value`.

    Raises:
        ConfigError: `argument` does not have this form, or the key has too many parts.
    """
    name, equals, text = argument.partition("=")
    if not equals or not name:
        raise ConfigError(f"{_short(argument)} is not of the form key=value; see --help for the keys")
    if name.count(".") >= DEEPEST:
        raise ConfigError(f"{_short(name)}: a key has at most {DEEPEST} parts; see --help for the keys")
    return name, text


def parse(name: str, text: str) -> Any:
    """Parse `text` as YAML, for the key `name`.

    Interpolations are kept as text, because they refer to the tree that the value becomes a part of.

    Raises:
        ConfigError: `text` is not valid YAML, or expands to too much.
    """
    try:
        check_yaml(text)
        return plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except ConfigError as error:
        raise ConfigError(f"{_short(text)} {error.problem}", name) from error
    except Exception as error:  # OmegaConf's errors and those of the YAML parser behind it
        raise ConfigError(f"{_short(text)} cannot be read: {first_line(error)}", name) from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
