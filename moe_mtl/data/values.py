"""One column of a batch -> canonical text or float64, whatever the type it came in.

A category is matched as text in a canonical form, so that the same table gives the same ids from CSV, Parquet or
pandas: surrounding white space is dropped; integers are written out exactly (never through a float); a float or a text
that holds a whole number is written as that integer (`1.0` -> `1`, what a nullable integer column turns into); a float
is written without an exponent, and so is a text as floats are written with one (`1e-05`, `3.2e+17`; not `1e5`, which
may be a code); booleans, and the texts `True`, `False`, `TRUE`, `FALSE`, become `true` and `false`; a moment, as text
or not, loses the zeros that end its seconds and, at midnight with no zone, its time (`2020-01-01T10:00:00.500000` ->
`2020-01-01 10:00:00.5`); other values keep Arrow's text form. Null, NaN and the values whose canonical text is in
`missing` (by default the empty one) are missing.
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError

MAX_EXACT_FLOAT = 2.0**63
WHITE_SPACE = " \t\n\r\f\v\u00a0"
WHOLE = r"^(-?[0-9]+)\.0+$"
EXPONENT = r"^-?[0-9](\.[0-9]+)?e[+-][0-9]+$"
MOMENT = r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?[ T]?([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?(Z|[+-][0-9]{2}:?[0-9]{2})?$"
SPELLINGS = {"-0": "0", "True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
NUMBER = r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?"
FEW = 32


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


def require_values(kind: pa.DataType, name: str) -> None:
    """Raises DataError unless the type has a text form: no lists, mappings or bytes."""
    scalar = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_text(kind)
    if not (scalar or pa.types.is_temporal(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)):
        raise DataError(f"expected text, numbers or booleans, found {kind}", name)


def factorise(column: pa.Array, missing: Sequence[str], name: str) -> tuple[np.ndarray, pa.Array]:
    """Codes and their canonical texts.

    Returns:
        codes: int64 `[B]`, positions in the second value; -1 where missing.
        texts: the canonical texts; two codes may share one (`1` and `1.0`).

    Raises:
        DataError: the column's type has no text form (a list, a mapping, bytes).
    """
    column = plain(column)
    if len(column) <= FEW and (quick := _factorise_few(column, missing)):
        return quick
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    if not pa.types.is_dictionary(column.type):
        require_values(column.type, name)
        column = column.dictionary_encode()
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    texts = canonical(column.dictionary, missing, name)
    if texts.null_count:
        gone = texts.is_null().to_numpy(zero_copy_only=False)
        codes = np.where(gone[codes] & (codes >= 0), -1, codes)
    return codes, texts


def _factorise_few(column: pa.Array, missing: Sequence[str]) -> tuple[np.ndarray, pa.Array] | None:
    """The same for a few texts, integers or booleans, where each call into Arrow costs more than all the work."""
    kind = column.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return None
    texts: dict[str, int] = {}
    codes = np.full(len(column), -1, np.int64)
    for i, value in enumerate(column.to_pylist()):
        if value is not None:
            text = canonical_text(value if isinstance(value, str) else str(value))
            if text not in missing:
                codes[i] = texts.setdefault(text, len(texts))
    return codes, pa.array(texts, pa.string())


def canonical_text(text: str) -> str:
    """The canonical form of one text."""
    text = text.strip(WHITE_SPACE)
    if ".0" in text:
        text = re.sub(WHOLE, r"\1", text)
    if "e" in text and re.search(EXPONENT, text):
        return _without_exponent(text)
    if ":" in text and (moment := re.search(MOMENT, text)):
        return _moment_text(*moment.groups(""))
    return SPELLINGS.get(text, text)


def _without_exponent(text: str) -> str:
    """`3.2e+17` -> the integer that this double is; `1e-05` -> `0.00001`; a number beyond doubles stays."""
    number = float(text)
    if not math.isfinite(number):
        return text
    return str(int(number)) if number == math.floor(number) else f"{Decimal(text):f}"


def _moment_text(date: str, time: str, fraction: str, zone: str) -> str:
    fraction = fraction.rstrip("0").rstrip(".")
    zone = "Z" if zone in ("+00:00", "+0000") else zone.replace(":", "")
    if date and time == "00:00:00" and not (fraction or zone):
        return date
    return f"{date} {time}{fraction}{zone}".lstrip()


def canonical(values: pa.Array, missing: Sequence[str], name: str) -> pa.Array:
    """The canonical text of each value, null where it is missing."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return _without(pc.if_else(values, "true", "false"), missing)
    if pa.types.is_floating(kind):
        return _without(_float_texts(values, name), missing)
    if pa.types.is_null(kind):
        return values.cast(pa.string())
    if pa.types.is_integer(kind):
        return _without(values.cast(pa.string()), missing)
    require_values(kind, name)
    if pa.types.is_duration(kind):
        values = values.cast(pa.duration("ns"))  # written as a bare number of its units
    texts = pc.utf8_trim(values.cast(pa.string()), characters=WHITE_SPACE)
    texts = pc.replace_substring_regex(texts, WHOLE, r"\1")
    odd = pc.match_substring_regex(texts, f"{EXPONENT}|{MOMENT}")
    if pc.any(odd).as_py():
        texts = pc.replace_with_mask(texts, odd.fill_null(False), _each(texts.filter(odd)))
    for wrong, right in SPELLINGS.items():
        found = pc.equal(texts, wrong)
        if pc.any(found).as_py():
            texts = pc.if_else(found, right, texts)
    return _without(texts, missing)


def _each(texts: pa.Array) -> pa.Array:
    return pa.array(map(canonical_text, texts.to_pylist()), pa.string())


def _without(texts: pa.Array, missing: Sequence[str]) -> pa.Array:
    """Null in place of the texts that stand for a missing value."""
    found = pc.is_in(texts, pa.array(missing, pa.string()))
    return pc.if_else(found, pa.scalar(None, pa.string()), texts) if pc.any(found).as_py() else texts


def _float_texts(values: pa.Array, name: str) -> pa.Array:
    if pa.types.is_float16(values.type):
        values = values.cast(pa.float32())
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
    if np.isinf(numbers).any():
        raise DataError("expected finite values, found an infinity", name)
    whole = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < MAX_EXACT_FLOAT)
    integers = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
    texts = values.cast(pa.string())
    odd = pc.match_substring(texts, "e")
    if pc.any(odd).as_py():
        texts = pc.replace_with_mask(texts, odd.fill_null(False), _each(texts.filter(odd)))
    texts = pc.if_else(pa.array(whole), integers, texts)
    return pc.if_else(pa.array(np.isnan(numbers)), pa.scalar(None, pa.string()), texts)


def canonical_list(values: Sequence[object], where: str) -> list[str]:
    """Declared values (of a label, a class) in canonical form.

    Raises:
        DataError: a value is missing, or two are the same once canonical.
    """
    texts: list[str] = []
    for value in values:
        text = canonical(pa.array([value]), ("",), where)[0].as_py()
        if not text or text in texts:
            raise DataError(f"{where}: expected distinct values, none of them empty, found {list(values)!r:.200}")
        texts.append(text)
    return texts


def numbers(column: pa.Array, missing: Sequence[str], name: str, rows: Sequence[int]) -> np.ndarray:
    """The column as float64 `[B]`, NaN where missing. Numbers written as text are read; booleans, also as text, are 0
    and 1.

    Raises:
        DataError: text that is no number, an infinity, or a type that holds no numbers.
    """
    column = plain(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        column = _parse(column, missing, name, rows)
    elif not (
        pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)
    ):
        if not (pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"expected numbers, found {column.type}", name)
        column = column.cast(pa.uint8())
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    # safe=False: an integer above 2^53 is rounded to the nearest double, as any number is
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if stands := [float(text) for text in missing if re.fullmatch(NUMBER, text)]:
        values = np.where(np.isin(values, stands), np.nan, values)
    infinite = np.isinf(values)
    if infinite.any():
        raise DataError(
            f"expected a finite number, found {values[infinite][0]}", name, int(rows[int(infinite.argmax())])
        )
    return values


def _parse(column: pa.Array, missing: Sequence[str], name: str, rows: Sequence[int]) -> pa.Array:
    texts = pc.utf8_trim(column.cast(pa.string()), characters=WHITE_SPACE)
    texts = _without(texts, missing)
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        truths = canonical(texts, (), name)
        if pc.all(pc.is_in(truths.drop_null(), pa.array(["true", "false"]))).as_py():
            return pc.equal(truths, "true").cast(pa.uint8())
        for i, text in enumerate(texts.to_pylist()):
            try:
                pa.scalar(text, pa.string()).cast(pa.float64())
            except pa.ArrowInvalid:
                raise DataError(f"expected a number, found the text {text!r:.80}", name, int(rows[i])) from None
        raise
