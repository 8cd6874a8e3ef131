"""Guesses the kind of each column of a table, by a rule short enough to be told to the user."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError
from .sources import Source, open_source
from .values import factorise, is_list, is_text, plain

CATEGORICAL_INTEGERS = 32
IDENTIFIER_SHARE = 0.5
IDENTIFIER_ROWS = 100
INFERENCE_ROWS = 200_000
SEPARATORS = ("|", ";", ",")


def infer_features(
    source: Any, exclude: Sequence[str] = (), missing_values: Sequence[str] = ("",), rows: int = INFERENCE_ROWS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Declarations for every column but `exclude`, and one line per column that tells what was chosen and why.

    The rule, from the first `rows` rows:

    - no name (the index that pandas writes), no value, or only one: left out;
    - lists: multi-hot;
    - booleans: categorical;
    - whole numbers (a text column of nothing but numbers counts as numbers): categorical with up to 32 distinct
      values, else numeric;
    - other numbers: numeric;
    - text and dates: categorical, but left out as an identifier where more than half of at least 100 values are
      distinct. Where more than half of the values hold a `|`, `;` or `,`, the note says how to declare lists.

    Raises:
        DataError: no column is left to learn from.
    """
    source = open_source(source)
    names = [name for name in source.columns if name not in set(exclude)]
    features: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, column in _head(source, names, rows).items():
        kind, why = _kind(column, missing_values, name) if name else (None, "it has no name")
        notes.append(f"{name or 'the column without a name'}: {kind or 'left out'} ({why})")
        if kind:
            features.append({"name": name, "kind": kind})
    if not features:
        found = "; ".join(notes) or "there are none beside the labels"
        raise DataError(f"expected columns to learn from, found none of use: {found}")
    return features, notes


def _head(source: Source, names: list[str], rows: int) -> dict[str, list[pa.Array]]:
    parts: dict[str, list[pa.Array]] = {name: [] for name in names}
    seen = 0
    for held, batch in source.batches(names):
        for name in names:
            parts[name].append(plain(batch[name]))
        seen += len(held)
        if seen >= rows:
            break
    return parts


def _kind(parts: list[pa.Array], missing: Sequence[str], name: str) -> tuple[str | None, str]:
    if any(is_list(part.type) for part in parts):
        return "multi_hot", "lists"
    parts = [part.dictionary_decode() if pa.types.is_dictionary(part.type) else part for part in parts]
    rows, values, holding = 0, [], dict.fromkeys(SEPARATORS, 0)
    for part in parts:
        codes, texts = factorise(part, missing, name)
        rows += int((codes >= 0).sum())
        values.append(texts)
        counts = np.bincount(codes[codes >= 0], minlength=len(texts))
        for separator in SEPARATORS:
            holds = pc.fill_null(pc.match_substring(texts, separator), False)
            holding[separator] += int(counts[holds.to_numpy(zero_copy_only=False)].sum())
    distinct = pc.unique(pa.chunked_array(values, pa.string()).drop_null())
    if len(distinct) < 2:
        return None, f"{len(distinct)} distinct value{'s' * (len(distinct) != 1)}"
    types = {part.type for part in parts if not pa.types.is_null(part.type)}
    if all(pa.types.is_boolean(kind) for kind in types):
        return "categorical", "booleans"
    if all(is_text(k) or pa.types.is_integer(k) or pa.types.is_floating(k) or pa.types.is_decimal(k) for k in types):
        try:
            numbers = distinct.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            numbers = None
        if numbers is not None:
            if (numbers == np.floor(numbers)).all() and len(distinct) <= CATEGORICAL_INTEGERS:
                return "categorical", f"{len(distinct)} distinct whole numbers"
            return "numeric", f"{len(distinct)} distinct numbers"
    cuts = [separator for separator in SEPARATORS if 2 * holding[separator] > rows]
    hint = f"; if they are lists, declare it multi_hot with the separator {cuts[0]!r}" if cuts else ""
    if rows >= IDENTIFIER_ROWS and len(distinct) > IDENTIFIER_SHARE * rows:
        return None, f"{len(distinct)} distinct values in {rows} rows: an identifier or free text{hint}"
    return "categorical", f"{len(distinct)} distinct values{hint}"
