"""Table columns -> one vector per row.

Shapes: `B` rows, `F` columns of one kind, `L` items of a multi-hot or sequence cell, `D` output width.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

NUMERIC_EMBEDDINGS = ("scaled", "piecewise_linear", "periodic")
POOLINGS = ("mean", "sum", "max")


class FeatureEncoder(nn.Module):
    """Numeric, categorical, multi-hot and sequence columns, embedded and laid side by side.

    All vocabularies share one embedding table `[sum of num_categories, embedding_dim]`; a column's ids are shifted by
    its offset, so that any number of columns costs one lookup. Multi-hot and sequence cells are pooled.

    Args:
        features: what `TabularProcessor.features` declares; order within a kind is column order in the tensors.
        embedding_dim: width of a categorical embedding.
        numeric_embedding: `scaled` (the number itself), `piecewise_linear` or `periodic` (Gorishniy et al., NeurIPS
            2022, "On Embeddings for Numerical Features in Tabular Deep Learning", through rtdl-num-embeddings). A
            column without bins stays scaled under `piecewise_linear`.
        numeric_embedding_dim: width of a numeric embedding.

    Output: `[B, D]` with categorical columns first, then multi-hot and sequence, embedded numeric, plain numeric.
    """

    categorical_sizes: Tensor
    categorical_offsets: Tensor
    bag_sizes: Tensor
    bag_offsets: Tensor
    like: Tensor
    embedding: nn.Embedding

    def __init__(
        self,
        features: Sequence[dict[str, Any]],
        embedding_dim: int,
        numeric_embedding: str,
        numeric_embedding_dim: int,
    ):
        super().__init__()
        of_kind = {kind: [f for f in features if f["kind"] == kind] for kind in ("numeric", "categorical")}
        self.numeric_names = [f["name"] for f in of_kind["numeric"]]
        self.categorical_names = [f["name"] for f in of_kind["categorical"]]
        bags = [f for f in features if f["kind"] in ("multi_hot", "sequence")]
        self.bag_names = [f["name"] for f in bags]
        self.poolings = [f["pooling"] for f in bags]

        sizes = [f["num_categories"] for f in of_kind["categorical"] + bags]
        if sizes:
            self.embedding = nn.Embedding(sum(sizes), embedding_dim)
        offsets = list(accumulate(sizes, initial=0))[: len(sizes)]
        split = len(self.categorical_names)
        self._constants = {
            "categorical_sizes": sizes[:split],
            "categorical_offsets": offsets[:split],
            "bag_sizes": sizes[split:],
            "bag_offsets": offsets[split:],
        }
        for name, values in self._constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        # Follows `.to(dtype)` and `.to(device)` where the encoder has no parameter that would.
        self.register_buffer("like", torch.empty(0), persistent=False)

        bins = [f.get("bins") for f in of_kind["numeric"]]
        if numeric_embedding == "scaled":
            embedded = []
        elif numeric_embedding == "piecewise_linear":
            embedded = [i for i, edges in enumerate(bins) if edges is not None]
        else:
            embedded = list(range(len(bins)))
        self.embedded_columns = embedded
        self.plain_columns = [i for i in range(len(bins)) if i not in set(embedded)]
        self.numeric: Any = None
        self.numeric_embedding = numeric_embedding
        self._bins = [bins[i] for i in embedded]
        if embedded:
            self.numeric = _numeric_embedding(numeric_embedding, self._bins, numeric_embedding_dim)
        self.output_dim = embedding_dim * len(sizes) + numeric_embedding_dim * len(embedded) + len(self.plain_columns)
        if self.output_dim == 0:
            raise ValueError("features: expected at least one column, found none")

    def reset_parameters(self) -> None:
        """Starts the numeric embedding anew, and refills what is derived from the config: a model built on the meta
        device holds garbage there. The embedding table is the model's to start."""
        for name, values in self._constants.items():
            init.copy_(self.get_buffer(name), torch.tensor(values, dtype=torch.int64))
        if self.numeric is None:
            return
        if self.numeric_embedding == "periodic":
            self.numeric.periodic.reset_parameters()
            self.numeric.linear.reset_parameters()
            return
        self.numeric.linear0.reset_parameters()
        init.zeros_(self.numeric.linear.weight)  # starts linear, learns the bends
        fresh = _numeric_embedding(self.numeric_embedding, self._bins, 1)
        for name, buffer in fresh.impl.named_buffers():
            init.copy_(self.numeric.impl.get_buffer(name), buffer)

    def forward(
        self,
        numeric_BF: Tensor | None = None,
        categorical_BF: Tensor | None = None,
        sequences_BFL: Tensor | None = None,
        *,
        checked: bool = False,
    ) -> Tensor:
        """Columns of each kind -> `[B, D]`.

        Args:
            numeric_BF: float `[B, F]`, finite.
            categorical_BF: int64 `[B, F]`, each id in `[0, num_categories)`.
            sequences_BFL: int64 `[B, F, L]`, padded with -1 anywhere; an empty cell pools to 0.
            checked: the inputs went through `check` before.

        Raises:
            ValueError: a missing or superfluous input, a wrong shape or dtype, an id out of range, NaN or infinity;
                the message names the column.
        """
        if not checked:
            self.check(numeric_BF, categorical_BF, sequences_BFL)
        parts: list[Tensor] = []
        if categorical_BF is not None:
            ids_BF = categorical_BF + self.categorical_offsets
            parts.append(self._look_up(ids_BF).flatten(1))
        if sequences_BFL is not None:
            parts.append(self._pool(sequences_BFL))
        if numeric_BF is not None:
            numeric_BF = numeric_BF.to(self.like.dtype)
            if self.numeric is not None:
                chosen = numeric_BF[:, self.embedded_columns] if self.plain_columns else numeric_BF
                parts.append(self.numeric(chosen).flatten(1))
            if self.plain_columns:
                parts.append(numeric_BF[:, self.plain_columns] if self.embedded_columns else numeric_BF)
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _look_up(self, ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        if weight.device.type != "cpu":
            return F.embedding(ids, weight)
        # The same rows; on a CPU the gradient of this is several times faster.
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    def _pool(self, ids_BFL: Tensor) -> Tensor:
        if ids_BFL.shape[-1] == 0:  # no cell of the batch holds anything
            ids_BFL = F.pad(ids_BFL, (0, 1), value=-1)
        present_BFL = ids_BFL >= 0
        shifted_BFL = ids_BFL.clamp_min(0) + self.bag_offsets.unsqueeze(-1)
        items_BFLD = self._look_up(shifted_BFL)
        present_BFL1 = present_BFL.unsqueeze(-1)
        out: list[Tensor] = []
        for column, pooling in enumerate(self.poolings):
            items_BLD, present_BL1 = items_BFLD[:, column], present_BFL1[:, column]
            if pooling == "max":
                pooled_BD = items_BLD.masked_fill(~present_BL1, -torch.inf).amax(dim=1)
                pooled_BD = torch.where(present_BL1.any(dim=1), pooled_BD, 0.0)
            else:
                pooled_BD = (items_BLD * present_BL1).sum(dim=1)
                if pooling == "mean":
                    pooled_BD = pooled_BD / present_BL1.sum(dim=1).clamp_min(1)
            out.append(pooled_BD)
        return torch.cat(out, dim=1)

    def check(self, numeric: Tensor | None, categorical: Tensor | None, sequences: Tensor | None) -> None:
        """Raises ValueError for inputs that do not fit; `forward` lists what."""
        inputs = (
            ("numeric", numeric, self.numeric_names, 2, (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
            ("categorical", categorical, self.categorical_names, 2, (torch.int64, torch.int32)),
            ("sequences", sequences, self.bag_names, 3, (torch.int64, torch.int32)),
        )
        rows = None
        for name, value, columns, dims, dtypes in inputs:
            if (value is None) != (not columns):
                expected = f"columns {', '.join(columns[:8])}" if columns else "nothing: the model has no such column"
                found = "nothing" if value is None else "some"
                raise ValueError(f"input `{name}`: expected {expected}; found {found}")
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"input `{name}`: expected a tensor, found {type(value).__name__}")
            if value.dim() != dims or value.shape[1] != len(columns):
                shape = "[B, {}]" if dims == 2 else "[B, {}, L]"
                raise ValueError(
                    f"input `{name}`: expected shape {shape.format(len(columns))}, found {list(value.shape)}"
                )
            if value.dtype not in dtypes:
                raise ValueError(f"input `{name}`: expected {' or '.join(map(str, dtypes))}, found {value.dtype}")
            if value.shape[0] == 0:  # not len(): an exported program would be tied to the example's rows
                raise ValueError(f"input `{name}`: the batch is empty (0 rows)")
            if rows is not None and value.shape[0] != rows:
                raise ValueError(f"input `{name}`: expected {rows} rows like the other inputs, found {value.shape[0]}")
            rows = value.shape[0]
        if torch.compiler.is_compiling():
            return
        if numeric is not None:
            cast = numeric.detach().to(self.like.dtype)  # what the model computes with: 1e300 is infinite in float32
            # A sum is finite only if its terms are; where it overflows, the slow look clears them. One pass, no mask.
            if not math.isfinite(cast.sum()) and not bool(torch.isfinite(cast).all()):
                row, column = (~torch.isfinite(cast)).nonzero()[0].tolist()
                number = numeric[row, column].item()
                within = f" in {self.like.dtype}" if math.isfinite(number) else ""
                where = f"column {self.numeric_names[column]!r}, row {row}"
                raise ValueError(f"{where}: expected a finite number{within}, found {number}")
        if categorical is not None:
            self._check_ids(categorical, self.categorical_sizes, self.categorical_names, lowest=0)
        if sequences is not None:
            self._check_ids(sequences, self.bag_sizes.unsqueeze(-1), self.bag_names, lowest=-1)

    @staticmethod
    def _check_ids(ids: Tensor, sizes: Tensor, names: Sequence[str], lowest: int) -> None:
        """On a GPU an id out of range would kill the process from within the lookup, so it is looked for here."""
        wrong = (ids < lowest) | (ids >= sizes)
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"column {names[where[1]]!r}, row {where[0]}: expected an id in "
                f"[{lowest}, {int(sizes.flatten()[where[1]]) - 1}], found {int(ids[tuple(where)])}"
            )


def _numeric_embedding(kind: str, bins: Sequence[Any], dim: int) -> Any:
    import rtdl_num_embeddings as rtdl  # brings scikit-learn along, which takes a second

    # On the CPU whatever the default device, as the encoding's constants are computed from the bins here; but of width
    # 1: what takes memory is widened on the default device, so that a model built on meta allocates nothing.
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column with a single bin is legal
        if kind == "periodic":
            embedding: Any = rtdl.PeriodicEmbeddings(len(bins), 1, lite=False)
        else:
            embedding = rtdl.PiecewiseLinearEmbeddings(_edges(bins), 1, activation=False, version="B")
    for name, module in embedding.named_children():
        if name in ("linear", "linear0"):
            for key, parameter in list(module.named_parameters()):
                setattr(module, key, nn.Parameter(torch.empty(*parameter.shape[:-1], dim)))
            module.reset_parameters()
    if kind != "periodic":
        nn.init.zeros_(embedding.linear.weight)  # starts linear, learns the bends
    return embedding


def _edges(bins: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(column, dtype=torch.float32, device="cpu") for column in bins]
