"""One column of a batch -> canonical text or float64, whatever the type it came in.

A category is matched as text in a canonical form, so that the same table gives the same ids from CSV, Parquet or pandas:
surrounding white space is dropped; integers are written out exactly (never through a float); a float or a text that
holds a whole number is written as that integer (`1.0` -> `1`, what a nullable integer column turns into); booleans,
and the texts `True`, `False`, `TRUE`, `FALSE`, become `true` and `false`; other values keep Arrow's text form.
Null, NaN and the texts in `missing` (by default the empty one) are missing.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError

MAX_EXACT_FLOAT = 2.0**63


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One contiguous array; extension types as what they store."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # some types cannot be combined into one array
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def factorise(column: pa.Array, missing: Sequence[str], name: str) -> tuple[np.ndarray, pa.Array]:
    """Codes and their canonical texts.

    Returns:
        codes: int64 `[B]`, positions in the second value; -1 where missing.
        texts: the canonical texts; two codes may share one (`1` and `1.0`).

    Raises:
        DataError: the column's type has no text form (a list, a mapping, bytes).
    """
    column = plain(column)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    texts = canonical(column.dictionary, missing, name)
    if texts.null_count:
        gone = texts.is_null().to_numpy(zero_copy_only=False)
        codes = np.where(gone[codes] & (codes >= 0), -1, codes)
    return codes, texts


def canonical(values: pa.Array, missing: Sequence[str], name: str) -> pa.Array:
    """The canonical text of each value, null where it is missing."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return pc.if_else(values, "true", "false")
    if pa.types.is_floating(kind):
        return _float_texts(values, name)
    if pa.types.is_null(kind):
        return values.cast(pa.string())
    if pa.types.is_integer(kind) or pa.types.is_temporal(kind) or pa.types.is_decimal(kind) or is_text(kind):
        texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
    else:
        raise DataError(f"expected text, numbers or booleans, found {kind}", name)
    if not pa.types.is_integer(kind):
        texts = pc.replace_substring_regex(texts, r"^(-?[0-9]+)\.0+$", r"\1")
        texts = pc.replace_substring_regex(texts, r"^-0$", "0")
        texts = pc.replace_substring_regex(texts, r"^([Tt]rue|TRUE)$", "true")
        texts = pc.replace_substring_regex(texts, r"^([Ff]alse|FALSE)$", "false")
        texts = pc.if_else(pc.is_in(texts, pa.array(missing, pa.string())), pa.scalar(None, pa.string()), texts)
    return texts


def _float_texts(values: pa.Array, name: str) -> pa.Array:
    if pa.types.is_float16(values.type):
        values = values.cast(pa.float32())
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
    if np.isinf(numbers).any():
        raise DataError("expected finite values, found an infinity", name)
    whole = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < MAX_EXACT_FLOAT)
    integers = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
    texts = pc.if_else(pa.array(whole), integers, values.cast(pa.string()))
    return pc.if_else(pa.array(np.isnan(numbers)), pa.scalar(None, pa.string()), texts)


def canonical_list(values: Sequence[object], where: str) -> list[str]:
    """Declared values (of a label, a class) in canonical form.

    Raises:
        DataError: a value is missing, or two are the same once canonical.
    """
    texts: list[str] = []
    for value in values:
        text = canonical(pa.array([value]), ("",), where)[0].as_py()
        if text is None or text in texts:
            raise DataError(f"{where}: expected distinct values, none of them empty, found {list(values)!r:.200}")
        texts.append(text)
    return texts


def numbers(column: pa.Array, missing: Sequence[str], name: str, rows: Sequence[int]) -> np.ndarray:
    """The column as float64 `[B]`, NaN where missing. Numbers written as text are read; booleans are 0 and 1.

    Raises:
        DataError: text that is no number, an infinity, or a type that holds no numbers.
    """
    column = plain(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        column = _parse(column, missing, name, rows)
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)):
        if not (pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"expected numbers, found {column.type}", name)
        column = column.cast(pa.uint8())
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    # safe=False: an integer above 2^53 is rounded to the nearest double, as any number is
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    infinite = np.isinf(values)
    if infinite.any():
        raise DataError(f"expected a finite number, found {values[infinite][0]}", name, int(rows[int(infinite.argmax())]))
    return values


def _parse(column: pa.Array, missing: Sequence[str], name: str, rows: Sequence[int]) -> pa.Array:
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    texts = pc.if_else(pc.is_in(texts, pa.array(missing, pa.string())), pa.scalar(None, pa.string()), texts)
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        for i, text in enumerate(texts.to_pylist()):
            try:
                pa.scalar(text, pa.string()).cast(pa.float64())
            except pa.ArrowInvalid:
                raise DataError(f"expected a number, found the text {text!r:.80}", name, int(rows[i])) from None
        raise
