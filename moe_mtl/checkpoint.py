"""Weights of a folder, read without trusting who wrote them.

Nothing here allocates what headers claim before the claim is compared with the file and with what the model expects.
Torch is imported by `Checkpoint.read` and `Checkpoint.stored` alone.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from .files import CheckpointError, ModelNotFoundError, UnsafeFileError, file_state, read_json, safe_file
from .hub import INDEX, PICKLES, WEIGHTS, verify_manifest

if TYPE_CHECKING:
    import torch

    from .stored import StoredTensor

MAX_HEADER_BYTES = 16 * 2**20  # some 150,000 tensors; the format itself allows 100 MB
# Of weights: as safetensors and as torch call them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
DTYPES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


class Checkpoint:
    """The safetensors of a folder, `model.safetensors` or shards with an index, checked by their headers.

    No tensor is allocated until `read`.

    Attributes:
        folder: where it lies.
        shapes: tensor name -> shape.
        dtypes: tensor name -> dtype as safetensors writes it ("F32", "BF16", ...).
        bytes_read: bytes of tensors read so far.

    Raises:
        ModelNotFoundError: no weights in the folder.
        UnsafeFileError: only pickles, or a path that leads out of the folder.
        CheckpointError: truncated, shards that contradict the index, an unknown dtype, a manifest that does not match.

    Args:
        folder: where it lies.
        hash_weights: compare the weights with the manifest too, where there is one: that reads every byte of them.
        weights: the file of weights that are in one; an adapter's has a name of its own.
    """

    def __init__(self, folder: str | Path, *, hash_weights: bool = True, weights: str = WEIGHTS) -> None:
        self.folder, self.weights = Path(folder), weights
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.bytes_read = 0
        self._files: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self._states: dict[Path, tuple[int, ...]] = {}
        weight_map = self._weight_map()
        for name in sorted(set(weight_map.values())) if weight_map is not None else [weights]:
            self._read_header(name)
        if weight_map is not None:
            self._compare_with_index(weight_map)
        verify_manifest(self.folder, weights=hash_weights)

    @cached_property
    def num_elements(self) -> int:
        """Elements of all tensors together: parameters, and buffers that are saved."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """`check_shapes` with what the model needs, before anything is allocated."""
        check_shapes(expected, self.shapes, f"the weights in {self.folder}")

    def read(self, name: str, index: Sequence[int] | None = None) -> "torch.Tensor":
        """The tensor `name`, on the CPU, in its stored dtype; with `index`, only those rows, in that order.

        Raises:
            KeyError: no such tensor.
            IndexError: a row out of range.
            CheckpointError: a value is NaN or infinite; or the file changed since its header was read.
        """
        if name not in self.shapes:
            raise KeyError(
                f"no tensor {name!r} in {self.folder}; nearest: {difflib.get_close_matches(name, self.shapes)}"
            )
        shape = self.shapes[name]
        rows = None if index is None else [int(row) for row in index]
        if rows is not None and (not shape or any(row < 0 or row >= shape[0] for row in rows)):
            raise IndexError(
                f"expected rows of {name} with shape {list(shape)}, found {_first([str(r) for r in rows])}"
            )
        tensor = self.stored(name).read(rows)
        self.bytes_read += tensor.nbytes
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad, file = int((~tensor.isfinite()).sum()), self._files[name].name
            raise CheckpointError(
                f"expected finite weights, found {bad} NaN or infinite values in {name} of {file} in {self.folder}"
            )
        return tensor

    def stored(self, name: str) -> "StoredTensor":
        """Where the tensor `name` is, for what reads it later."""
        import torch

        from .stored import StoredTensor

        path, dtype = self._files[name], getattr(torch, DTYPES[self.dtypes[name]])
        return StoredTensor(name, path, self._offsets[name], self.shapes[name], dtype, self._states[path])

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor name -> shard as the index says, each shard's name checked; None for a single file."""
        if not self.folder.is_dir():
            raise ModelNotFoundError(f"expected a model folder, found none at {self.folder}")
        names = {entry.name for entry in self.folder.iterdir()}
        if self.weights in names and INDEX in names and self.weights == WEIGHTS:  # an adapter may lie beside its base
            raise CheckpointError(
                f"expected either {self.weights} or {INDEX} in {self.folder}, found both: one of them is stale"
            )
        if self.weights in names:
            return None
        if INDEX not in names:
            pickles = sorted(name for name in names if name.endswith(PICKLES))
            if pickles:
                raise UnsafeFileError(
                    f"expected {WEIGHTS} in {self.folder}, found {_first(pickles)}: "
                    "pickles can run code and are refused; convert them to safetensors where you trust them"
                )
            raise ModelNotFoundError(f"expected {WEIGHTS} or {INDEX} in {self.folder}, found neither")
        weight_map = read_json(self.folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"expected an object 'weight_map' of tensor names and files in {INDEX} of {self.folder}"
            )
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise UnsafeFileError(
                    f"expected the name of a .safetensors file beside {INDEX} for {tensor!r}, found {shard!r}"
                )
        return weight_map

    def _read_header(self, file_name: str) -> None:
        path = safe_file(self.folder, file_name)
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            size, header = stat.st_size, int.from_bytes(file.read(8), "little")
            content = file.read(min(header, MAX_HEADER_BYTES))
        if size < 8 or header > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file_name} of {self.folder} is truncated or no safetensors file: "
                f"{size:,} bytes with a header of {header:,} (at most {MAX_HEADER_BYTES:,})"
            )
        try:
            # safetensors itself compares every shape, dtype and offset with the others and with the size of the file.
            with safe_open(path, framework="numpy") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no iterator there
                described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in found.items()}
            parsed = json.loads(content)
            places = {name: 8 + header + parsed[name]["data_offsets"][0] for name in described}
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{file_name} of {self.folder} is truncated or no safetensors file: {error}"
            ) from None
        for name, (shape, dtype) in described.items():
            if name in self._files:
                raise CheckpointError(
                    f"the tensor {name} is in two files of {self.folder}: {self._files[name].name} and {file_name}"
                )
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"expected one of the dtypes {', '.join(DTYPES)} for {name} in {file_name} of {self.folder}, "
                    f"found {dtype}"
                )
            if any(side >= 2**63 for side in shape):  # of an empty tensor: no bytes speak against it
                raise CheckpointError(f"{file_name} of {self.folder} declares {list(shape)} as the shape of {name}")
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._files[name], self._offsets[name] = path, places[name]
        self._states[path] = file_state(stat)

    def _compare_with_index(self, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            if name not in self._files or self._files[name] != safe_file(self.folder, shard):
                raise CheckpointError(
                    f"{INDEX} of {self.folder} says that {name} is in {shard}, which does not hold it"
                )
        unlisted = [name for name in self.shapes if name not in weight_map]
        if unlisted:
            raise CheckpointError(
                f"{len(unlisted)} tensors in the shards of {self.folder} are not in {INDEX}: {_first(unlisted)}"
            )


def check_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], what: str) -> None:
    """Compares names and shapes of tensors.

    Raises:
        CheckpointError: one error that lists every missing, unexpected and mismatched tensor.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    mismatched = [
        f"{name} (expected {list(shape)}, found {list(found[name])})"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)]
    told = [f"{len(names)} {kind}: {_first(names)}" for kind, names in problems if names]
    if told:
        raise CheckpointError(f"{what} do not fit the model: {'; '.join(told)}")


def _first(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
