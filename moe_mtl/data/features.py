"""The one table of feature kinds: what can be declared, what it becomes once fitted."""

from collections.abc import Mapping, Sequence
from typing import Any

from .categories import CategoricalColumn, CategoricalFeature, CategoryCounts, ListColumn, ListFeature
from .errors import DataError, check_choice, check_keys
from .numeric import EXACT_VALUES, NumericColumn, NumericFeature, NumericSummary

FEATURES: dict[str, Any] = {
    "numeric": NumericFeature,
    "categorical": CategoricalFeature,
    "multi_hot": ListFeature,
    "sequence": ListFeature,
}
COLUMNS: dict[str, Any] = {
    "numeric": NumericColumn,
    "categorical": CategoricalColumn,
    "multi_hot": ListColumn,
    "sequence": ListColumn,
}
# Values held for quantiles, over all numeric columns together: a bound on memory, about 0.6 GB.
HELD_VALUES = 20_000_000

Feature = NumericFeature | CategoricalFeature | ListFeature
Column = NumericColumn | CategoricalColumn | ListColumn


def declare_feature(fields: Mapping[str, Any]) -> Feature:
    """A feature from its declaration: `name`, `kind` and the options of that kind.

    Raises:
        DataError: an unknown kind or option, or a value that makes no sense, by name.
    """
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str) or not fields["name"]:
        raise DataError(f"expected a feature with a name, found {fields!r:.80}")
    where = f"feature {fields['name']!r}"
    check_choice(fields.get("kind"), FEATURES, f"{where}: kind")
    cls = FEATURES[fields["kind"]]
    known = ["kind", *(name for name in cls.__dataclass_fields__ if name != "kind")]
    fields = check_keys(fields, known, where)
    return cls(**{key: value for key, value in fields.items() if key != "kind" or cls is ListFeature})


class FeatureFitter:
    """Watches the training rows go by and makes the fitted columns."""

    def __init__(self, declared: Sequence[Mapping[str, Any]]):
        self.features = [declare_feature(fields) for fields in declared]
        self.names = [feature.name for feature in self.features]
        numeric = sum(isinstance(feature, NumericFeature) for feature in self.features)
        limit = min(EXACT_VALUES, HELD_VALUES // max(numeric, 1))
        self.states: list[Any] = [
            NumericSummary(limit) if isinstance(feature, NumericFeature) else CategoryCounts()
            for feature in self.features
        ]

    def update(self, batch: Mapping[str, Any], missing: Sequence[str], rows: Sequence[int]) -> None:
        """Takes one batch of training rows."""
        for feature, state in zip(self.features, self.states, strict=True):
            feature.count(state, batch[feature.name], missing, rows)

    def finish(self) -> list[Column]:
        """The fitted columns, in the declared order."""
        return [feature.fit(state) for feature, state in zip(self.features, self.states, strict=True)]
