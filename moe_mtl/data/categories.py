"""Categorical, multi-hot and sequence features: values to ids through a vocabulary.

Ids: 0 is "unknown"; the values follow by descending frequency in training, then by text; last comes "missing", where it
occurred in training (else a missing value is unknown).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError, check_choice, check_int, check_keys
from .values import WHITE_SPACE, factorise, is_list, is_text, plain

LOOKUP_LIMIT = 1024
MAX_LENGTH, DEFAULT_LENGTH = 4096, 256


class CategoryCounts:
    """Exact counts of canonical texts, of missing values, and the longest list seen."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.missing = 0
        self.longest = 0

    def update(self, codes: np.ndarray, texts: pa.Array) -> None:
        """Takes what `factorise` returned."""
        present = codes[codes >= 0]
        self.missing += len(codes) - len(present)
        counted = np.bincount(present, minlength=len(texts))
        for text, count in zip(texts.to_pylist(), counted.tolist(), strict=True):
            if count:
                self.counts[text] = self.counts.get(text, 0) + count

    def vocabulary(self, min_count: int, max_categories: int | None) -> list[str]:
        """Values seen at least `min_count` times, the most frequent first; ties by text."""
        kept = [text for text, count in self.counts.items() if count >= min_count]
        kept.sort()
        kept.sort(key=self.counts.__getitem__, reverse=True)  # stable: ties stay sorted by text
        return kept[:max_categories]


@dataclass(frozen=True)
class Vocabulary:
    """Canonical texts and their ids, 1 and up."""

    name: str
    values: list[str]
    unseen: str

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {value: i for i, value in enumerate(self.values, 1)}

    @cached_property
    def _set(self) -> pa.Array:
        return pa.array(self.values, pa.string())

    def ids(self, codes: np.ndarray, texts: pa.Array, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 `[B]` from what `factorise` returned: ids, 0 for a value not in the vocabulary, -1 for a missing one.

        Raises:
            DataError: an unknown value, where that is declared an error.
        """
        if len(texts) <= LOOKUP_LIMIT:  # Arrow hashes the whole vocabulary at each call
            table = np.fromiter((self._ids.get(text, 0) for text in texts.to_pylist()), np.int64, len(texts))
        else:
            table = (
                pc.index_in(texts, value_set=self._set).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
                + 1
            )
        ids = np.append(table, -1)[codes]  # code -1, missing, reads the last entry
        if self.unseen == "error" and (ids == 0).any():
            first = int((ids == 0).argmax())
            text = texts[int(codes[first])].as_py()
            known = ", ".join(map(repr, self.values[:5])) + (", ..." if len(self.values) > 5 else "")
            raise DataError(
                f"expected a value seen in training ({known}), found {text!r:.80}", self.name, int(rows[first])
            )
        return ids


def check_vocabulary(values: Any, where: str) -> None:
    """Raises DataError unless `values` is a list of distinct texts."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: expected a list of texts, found {values!r:.80}")
    if len(set(values)) < len(values):
        raise DataError(f"{where}: expected distinct values, found one twice")


@dataclass(frozen=True)
class CategoricalFeature:
    """A declared categorical feature.

    Attributes:
        name: the column.
        unseen: "unknown" maps a value not seen in training to id 0, "error" refuses it.
        missing: "category" gives missing values a category of their own if training has some (else they are unknown);
            "error" refuses them.
        min_count: values seen less often are unknown.
        max_categories: keep only so many values, the most frequent ones.
    """

    name: str
    unseen: str = "unknown"
    missing: str = "category"
    min_count: int = 1
    max_categories: int | None = None

    def __post_init__(self) -> None:
        where = f"feature {self.name!r}"
        check_choice(self.unseen, ("unknown", "error"), f"{where}: unseen")
        check_choice(self.missing, ("category", "error"), f"{where}: missing")
        check_int(self.min_count, 1, 2**62, f"{where}: min_count")
        if self.max_categories is not None:
            check_int(self.max_categories, 1, 2**31, f"{where}: max_categories")

    def count(self, counts: CategoryCounts, column: pa.Array, missing: Sequence[str], rows: Sequence[int]) -> None:
        """Adds one batch."""
        codes, texts = factorise(column, missing, self.name)
        if self.missing == "error" and (codes < 0).any():
            raise DataError("expected a value, found none", self.name, int(rows[int((codes < 0).argmax())]))
        counts.update(codes, texts)

    def fit(self, counts: CategoryCounts) -> "CategoricalColumn":
        """The fitted feature; a column without any value has the category "unknown" alone, and "missing"."""
        vocabulary = Vocabulary(self.name, counts.vocabulary(self.min_count, self.max_categories), self.unseen)
        return CategoricalColumn(self.name, vocabulary, self.missing, counts.missing > 0)


@dataclass(frozen=True)
class CategoricalColumn:
    """A fitted categorical feature."""

    name: str
    vocabulary: Vocabulary
    missing: str
    missing_seen: bool

    kind = "categorical"

    @property
    def num_categories(self) -> int:
        return 1 + len(self.vocabulary.values) + self.missing_seen

    def describe(self) -> dict[str, Any]:
        """What a model's config needs to know."""
        return {"name": self.name, "kind": self.kind, "num_categories": self.num_categories}

    def encode(self, column: pa.Array, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """int64 `[B]`, ids in `[0, num_categories)`.

        Raises:
            DataError: a column that holds no values, an unknown or missing value where that is declared an error.
        """
        codes, texts = factorise(column, missing, self.name)
        ids = self.vocabulary.ids(codes, texts, rows)
        absent = ids < 0
        if absent.any():
            if self.missing == "error":
                raise DataError("expected a value, found none", self.name, int(rows[int(absent.argmax())]))
            ids[absent] = self.num_categories - 1 if self.missing_seen else 0
        return ids

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "values": self.vocabulary.values,
            "unseen": self.vocabulary.unseen,
            "missing": self.missing,
            "missing_seen": self.missing_seen,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CategoricalColumn":
        """Raises DataError for a field of the wrong type or a vocabulary with a value twice."""
        where = f"feature {fields.get('name')!r}"
        keys = ("name", "kind", "values", "unseen", "missing", "missing_seen")
        fields = check_keys(fields, keys, where, keys)
        check_vocabulary(fields["values"], f"{where}: values")
        check_choice(fields["unseen"], ("unknown", "error"), f"{where}: unseen")
        check_choice(fields["missing"], ("category", "error"), f"{where}: missing")
        if not isinstance(fields["missing_seen"], bool):
            raise DataError(f"{where}: missing_seen: expected true or false, found {fields['missing_seen']!r}")
        vocabulary = Vocabulary(fields["name"], fields["values"], fields["unseen"])
        return cls(fields["name"], vocabulary, fields["missing"], fields["missing_seen"])


@dataclass(frozen=True)
class ListFeature:
    """A declared multi-hot or sequence feature: a list column, or text that a separator cuts.

    Attributes:
        name: the column.
        kind: "multi_hot": a set, repeated values count once and the first `max_length` stay; "sequence": in order, the
            last `max_length` stay.
        separator: cuts text columns.
        max_length: ids per row; by default the longest row of training, at most 256.
        pooling: how the model pools the embeddings.
        unseen: "unknown" maps a value not seen in training to id 0, "error" refuses it.
        min_count: values seen less often are unknown.
        max_categories: keep only so many values, the most frequent ones.
    """

    name: str
    kind: str
    separator: str = "|"
    max_length: int | None = None
    pooling: str = "mean"
    unseen: str = "unknown"
    min_count: int = 1
    max_categories: int | None = None

    def __post_init__(self) -> None:
        where = f"feature {self.name!r}"
        check_choice(self.unseen, ("unknown", "error"), f"{where}: unseen")
        check_choice(self.pooling, ("mean", "sum", "max"), f"{where}: pooling")
        check_int(self.min_count, 1, 2**62, f"{where}: min_count")
        if not isinstance(self.separator, str) or not self.separator:
            raise DataError(f"{where}: separator: expected a text, found {self.separator!r}")
        for name, high in (("max_length", MAX_LENGTH), ("max_categories", 2**31)):
            if (value := getattr(self, name)) is not None:
                check_int(value, 1, high, f"{where}: {name}")

    def count(self, counts: CategoryCounts, column: pa.Array, missing: Sequence[str], rows: Sequence[int]) -> None:
        """Adds one batch."""
        lengths, codes, texts, _ = split_lists(column, self.separator, missing, self.name)
        counts.update(codes, texts)
        counts.longest = max(counts.longest, int(lengths.max(initial=0)))

    def fit(self, counts: CategoryCounts) -> "ListColumn":
        vocabulary = Vocabulary(self.name, counts.vocabulary(self.min_count, self.max_categories), self.unseen)
        max_length = self.max_length or min(max(counts.longest, 1), DEFAULT_LENGTH)
        return ListColumn(self.name, self.kind, vocabulary, self.separator, max_length, self.pooling)


def split_lists(
    column: pa.Array, separator: str, missing: Sequence[str], name: str
) -> tuple[np.ndarray, np.ndarray, pa.Array, np.ndarray]:
    """Lengths `[B]`, codes and texts of all items one after another, and which rows are missing, bool `[B]`.

    Missing items are left out.

    Raises:
        DataError: neither lists nor text, or items that are no values.
    """
    column = plain(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        texts = pc.utf8_trim(column.cast(pa.string()), characters=WHITE_SPACE)
        column = pc.split_pattern(
            pc.if_else(pc.is_in(texts, pa.array(missing, texts.type)), pa.scalar(None, texts.type), texts), separator
        )
    elif pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.string()))
    if not is_list(column.type):
        raise DataError(f"expected lists, or text cut by {separator!r}, found {column.type}", name)
    codes, texts = factorise(pc.list_flatten(column), missing, name)
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    present = codes >= 0
    if not present.all():
        owner = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(owner[present], minlength=len(lengths)).astype(np.int64)
        codes = codes[present]
    return lengths, codes, texts, column.is_null().to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class ListColumn:
    """A fitted multi-hot or sequence feature."""

    name: str
    kind: str
    vocabulary: Vocabulary
    separator: str
    max_length: int
    pooling: str
    num_categories: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_categories", 1 + len(self.vocabulary.values))

    def describe(self) -> dict[str, Any]:
        """What a model's config needs to know."""
        described = {"name": self.name, "kind": self.kind, "num_categories": self.num_categories}
        return described | {"pooling": self.pooling, "max_length": self.max_length}

    def encode(self, column: pa.Array, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """int64 `[B, max_length]`, -1 after the last id.

        Raises:
            DataError: neither lists nor text, an unknown value where that is declared an error.
        """
        lengths, codes, texts, _ = split_lists(column, self.separator, missing, self.name)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        ids = self.vocabulary.ids(codes, texts, np.asarray(rows)[owner])
        if self.kind == "multi_hot":
            _, first = np.unique(owner * self.num_categories + ids, return_index=True)
            first.sort()
            owner, ids = owner[first], ids[first]
            lengths = np.bincount(owner, minlength=len(lengths))
        starts = np.cumsum(lengths) - lengths
        place = np.arange(len(ids)) - starts[owner]
        if self.kind == "sequence":
            place -= np.maximum(lengths - self.max_length, 0)[owner]
        kept = (place >= 0) & (place < self.max_length)
        out = np.full((len(lengths), self.max_length), -1, np.int64)
        out[owner[kept], place[kept]] = ids[kept]
        return out

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "values": self.vocabulary.values,
            "unseen": self.vocabulary.unseen,
            "separator": self.separator,
            "max_length": self.max_length,
            "pooling": self.pooling,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ListColumn":
        """Raises DataError for a field of the wrong type or a vocabulary with a value twice."""
        where = f"feature {fields.get('name')!r}"
        keys = ("name", "kind", "values", "unseen", "separator", "max_length", "pooling")
        fields = check_keys(fields, keys, where, keys)
        check_vocabulary(fields["values"], f"{where}: values")
        declared = ListFeature(
            *(fields[key] for key in ("name", "kind", "separator", "max_length", "pooling", "unseen"))
        )
        if declared.max_length is None:
            raise DataError(f"{where}: max_length: expected an integer, found null")
        vocabulary = Vocabulary(declared.name, fields["values"], declared.unseen)
        return cls(declared.name, declared.kind, vocabulary, declared.separator, declared.max_length, declared.pooling)
