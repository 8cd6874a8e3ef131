"""The rows that are trained on: Census-Income's own, or generated ones with its columns.

Shapes: `N` rows, `F` columns of one kind, `T` tasks.
"""

from pathlib import Path

import torch

from .contenders import Rows

# Categories per column of census-income-half, one of each for unseen values included.
CATEGORIES = (
    *(10, 53, 48, 18, 4, 25, 16, 6, 11, 3, 4, 7, 9, 7, 7, 52, 37, 9, 11, 10, 11, 4, 5, 6, 44, 44, 44, 6, 4, 4, 4, 3),
)
NUM_NUMERIC = 7
NUM_ROWS = 59_871


def generated_rows(num_rows: int, seed: int) -> tuple[Rows, tuple[int, ...]]:
    """Rows with the cardinalities of census-income-half and two random labels: values are noise, the cost is not.

    Returns:
        the rows, and the categories of each categorical column.
    """
    draw = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (num_rows,), generator=draw) for size in CATEGORIES]
    rows = {
        "numeric": torch.randn(num_rows, NUM_NUMERIC, generator=draw),
        "categorical": torch.stack(columns, dim=1),
        "labels": torch.randint(2, (num_rows, 2), generator=draw).float(),
    }
    return rows, CATEGORIES


def census_rows(path: str | Path) -> tuple[Rows, tuple[int, ...]]:
    """The training rows of Census-Income, encoded: 32 categorical columns, 7 standardised numeric ones, two labels.

    Raises:
        DataError: not the UCI file.
        FileNotFoundError: no such path.
    """
    from ..data import load

    splits = load("census-income", path=str(path))
    processor = splits.fit_processor()
    encoded = processor(splits.train)
    labels = torch.stack(list(encoded.pop("labels").values()), dim=1)
    sizes = [feature["num_categories"] for feature in processor.features if feature["kind"] == "categorical"]
    return {**encoded, "labels": labels}, tuple(sizes)


def first(rows: Rows, limit: int | None) -> Rows:
    """The first `limit` rows, or all."""
    return rows if limit is None else {name: values[:limit] for name, values in rows.items()}
