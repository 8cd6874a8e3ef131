"""Data: processors that turn rows into tensors, and one file per data set.

A data set is a module of this package that defines a dataclass `Options` and a function `load(options) -> DataSplits`,
`-> TextSplits` for text or `-> ImageSplits` for pictures; the file name gives the name (`census_income.py` is
"census-income"). Names are imported when first used: importing this package imports neither torch nor pyarrow.
"""

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..naming import nearest
from .errors import DataError

if TYPE_CHECKING:
    from .images import ImageSplits, ImageTable
    from .infer import infer_features
    from .processor import TabularProcessor
    from .sources import Source, open_source
    from .splits import DataSplits
    from .tensors import ShuffledBatches, TensorTable, as_is
    from .text import TextSplits
    from .vision_processor import VisionProcessor

_HOMES = {
    "DataSplits": "splits",
    "ImageSplits": "images",
    "ImageTable": "images",
    "ShuffledBatches": "tensors",
    "Source": "sources",
    "TabularProcessor": "processor",
    "TensorTable": "tensors",
    "TextSplits": "text",
    "VisionProcessor": "vision_processor",
    "as_is": "tensors",
    "infer_features": "infer",
    "open_source": "sources",
}
__all__ = [
    "DataError",
    "DataSplits",
    "ImageSplits",
    "ImageTable",
    "ShuffledBatches",
    "Source",
    "TabularProcessor",
    "TensorTable",
    "TextSplits",
    "VisionProcessor",
    "as_is",
    "data_sets",
    "infer_features",
    "is_images",
    "is_text",
    "load",
    "open_source",
    "options_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def data_sets() -> list[str]:
    """Names of all data sets, without importing them."""
    return list(_returned())


def options_of(name: str) -> type:
    """The options dataclass of a data set; its docstring tells what each field does.

    Raises:
        DataError: no such data set; names the nearest.
    """
    return _module(name).Options


def is_text(name: str) -> bool:
    """Whether a data set is text for a language model. Raises DataError if there is no such data set."""
    return _splits_of(name) == "TextSplits"


def is_images(name: str) -> bool:
    """Whether a data set is pictures for a vision model. Raises DataError if there is no such data set."""
    return _splits_of(name) == "ImageSplits"


def _splits_of(name: str) -> str:
    found = _returned()
    if name not in found:
        raise DataError(f"unknown data set {name!r}{nearest(name, found)}")
    return found[name]


def _returned() -> dict[str, str]:
    """What the `load` of each data set returns, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        load = re.search(r"^def load\(options: Options\) -> (\w+):", source, re.M)
        if load and re.search(r"^class Options\b", source, re.M):
            found[path.stem.replace("_", "-")] = load[1]
    return found


def load(name: str, **options: Any) -> "DataSplits | TextSplits | ImageSplits":
    """Loads a data set by name.

    Raises:
        DataError: no such data set or option, naming the nearest; a value the data set refuses.
    """
    module = _module(name)
    known = [field.name for field in dataclasses.fields(module.Options)]
    for key in options:
        if key not in known:
            raise DataError(f"data set {name!r}: unknown option {key!r}{nearest(key, known)}")
    needed = [
        f.name for f in dataclasses.fields(module.Options) if f.default is f.default_factory is dataclasses.MISSING
    ]
    if absent := [key for key in needed if key not in options]:
        raise DataError(f"data set {name!r}: expected the option {', '.join(map(repr, absent))}, found none")
    hints = typing.get_type_hints(module.Options)
    for key, value in options.items():
        if not _suits(value, hints[key]):
            raise DataError(f"data set {name!r}: {key}: expected {_told(hints[key])}, found {value!r:.80}")
    return module.load(module.Options(**options))


def _suits(value: Any, hint: Any) -> bool:
    """Whether an option's value is of the type it is annotated with; integers pass for floats, lists for tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_suits(value, one) for one in arguments)
    if origin in (tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_suits(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _told(hint: Any, plural: bool = False) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_told(one, plural) for one in arguments if one not in (type(None), Path)))
    if origin in (tuple, Sequence):
        return f"a list of {_told(arguments[0], plural=True)}"
    words = {
        bool: ("true or false", "truths"),
        str: ("a text", "texts"),
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
    }
    return words.get(hint, ("a mapping", "mappings"))[plural]


def _module(name: str) -> Any:
    names = data_sets()
    if name not in names:
        raise DataError(f"unknown data set {name!r}{nearest(name, names)}")
    return importlib.import_module(f".{name.replace('-', '_')}", __name__)
