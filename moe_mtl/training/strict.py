"""YAML into dataclasses, strictly: unknown keys, wrong types and keys that stand twice are errors that name the key.

Field metadata: `key` is the name of a field in YAML where it differs; `rest` marks the mapping that takes all further
keys.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ..naming import nearest

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 reads 1e-3 as text, YAML 1.2 as a number
_NUMBER_TAG, _NUMBER_STARTS = "tag:yaml.org,2002:float", list("-+.0123456789")


class RecipeError(ValueError):
    """A recipe that cannot be followed: the message names the section and the key."""


def check(condition: bool, key: str, expected: str, found: Any) -> None:
    """Raises RecipeError unless the condition holds."""
    if not condition:
        raise RecipeError(f"{key}: expected {expected}, found {found!r}")


def build(cls: type, content: Any, where: str = "") -> Any:
    """The dataclass `cls` from a mapping, `where` being its dotted key.

    Raises:
        RecipeError: no mapping, an unknown key (names the nearest), a value of another type than the field's.
    """
    place = f"section {where!r}" if where else "recipe"
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where or 'recipe'}: expected a mapping of keys, found {content!r:.80}")
    hints = typing.get_type_hints(cls)
    fields = {field.metadata.get("key", field.name): field for field in dataclasses.fields(cls)}
    rest = next((field.name for field in fields.values() if field.metadata.get("rest")), None)
    if rest is not None:
        content = _fold(content, set(fields), rest, place)
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise RecipeError(f"{place}: unknown key {key!r}{nearest(str(key), fields)}")
        name = fields[key].name
        values[name] = coerce(value, hints[name], f"{where}.{key}" if where else key)
    return cls(**values)


def unbuild(value: Any) -> Any:
    """The YAML content that `build` reads back."""
    if not dataclasses.is_dataclass(value):
        return value
    out: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        content = unbuild(getattr(value, field.name))
        if field.metadata.get("rest"):
            out |= content
        else:
            out[field.metadata.get("key", field.name)] = content
    return out


def _fold(content: Mapping[str, Any], known: set[str], rest: str, place: str) -> dict[str, Any]:
    own = {key: value for key, value in content.items() if key in known}
    further = {key: value for key, value in content.items() if key not in known}
    given = own.get(rest) or {}
    if not isinstance(given, Mapping) or set(given) & (known | set(further)):
        raise RecipeError(f"{place}: write the keys of {rest!r} into the section itself")
    return {**own, rest: {**given, **further}}


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` if it is of the type `hint`; integers pass for floats.

    Raises:
        RecipeError: it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(value, arguments, where)
    if origin is Literal:
        check(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is list:
        check(isinstance(value, list), where, "a list", value)
        return [coerce(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        check(isinstance(value, Mapping), where, "a mapping", value)
        return {str(key): coerce(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if hint is float:
        check(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    if hint is int:
        check(isinstance(value, int) and not isinstance(value, bool), where, "an integer", value)
        return value
    names = {"str": "text", "bool": "true or false"}
    check(isinstance(value, hint), where, names.get(hint.__name__, hint.__name__), value)
    return value


def _coerce_union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    for hint in hints[:-1]:
        try:
            return coerce(value, hint, where)
        except RecipeError:
            continue
    return coerce(value, hints[-1], where)


def read_yaml(text: str, where: str) -> Any:
    """YAML content, safely loaded; 1e-3 is a number. Raises RecipeError for no YAML, or a key that stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader, but a key that stands twice is an error instead of the last one winning."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise RecipeError(f"{where}: the key {key!r} stands twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(_NUMBER_TAG, _NUMBER, _NUMBER_STARTS)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: this is no YAML: {' '.join(str(error).split())}") from None


def write_yaml(content: Any) -> str:
    """What `read_yaml` reads back as the same content: a text such as 5E10 is quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver(_NUMBER_TAG, _NUMBER, _NUMBER_STARTS)
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
