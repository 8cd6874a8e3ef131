"""A zoo name, a folder or a Hub id -> a checked local folder; weights read without trusting who wrote them.

A model folder is data from outside. Nothing here runs code from it, follows a path out of it, or allocates what its
headers claim before the claim is compared with the file and with what the model expects. Torch is imported by
`Checkpoint.read` and `Checkpoint.stored` alone.
"""

import difflib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .files import (
    CheckpointError,
    ModelNotFoundError,
    UnsafeFileError,
    file_state,
    read_json,
    safe_file,
    write_atomically,
)

if TYPE_CHECKING:
    import torch

    from .stored import StoredTensor

WEIGHTS, INDEX, CONFIG, MANIFEST = "model.safetensors", "model.safetensors.index.json", "config.json", "manifest.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_TOKENIZERS = ("chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.md", *OF_TOKENIZERS]  # never code, never pickles
WEIGHT_FILES = (WEIGHTS, "model-*.safetensors", INDEX)
MAX_HEADER_BYTES = 16 * 2**20  # some 150,000 tensors; the format itself allows 100 MB
# Of weights: as safetensors and as torch call them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
DTYPES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# The last two name kernels, which transformers may fetch from the Hub: an argument of from_pretrained can ask for that.
CODE_KEYS = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


# --- where things are -------------------------------------------------------------------------------------------------


def data_folder(name: str) -> Path:
    """The folder `name` that travels with the library: `moe_mtl/_<name>` in a wheel, `<name>/` in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name


def zoo_folder() -> Path:
    """The folder of the model cards; one folder in it is one model, weights included."""
    return data_folder("model_cards")


def recipes_folder() -> Path:
    """The folder of the recipes, `<data set>/<model>.yaml`."""
    return data_folder("recipes")


def zoo() -> dict[str, Path]:
    """Every model of the zoo by name, sorted."""
    folders = {path.parent for name in (CONFIG, ADAPTER) for path in zoo_folder().glob(f"[!._]*/{name}")}
    return {folder.name: folder for folder in sorted(folders)}


def zoo_or(name: str | Path) -> str | Path:
    """The folder of a zoo name; any other name as it is, for transformers to find: a folder or a Hub id."""
    return zoo().get(str(name), name)


def is_text_model(folder: str | Path) -> bool:
    """Whether a folder holds a language model or an adapter, not a model of tables."""
    return (Path(folder) / ADAPTER).is_file() or (Path(folder) / "tokenizer_config.json").is_file()


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The local folder of a model: an existing folder, else a name of the zoo, else a Hub id `owner/name`.

    Of a Hub repository only the safetensors, JSON and Markdown files in its top folder are downloaded, and what
    tokenisers keep besides: a chat template, `tokenizer.model`, `merges.txt`, `vocab.txt`. `revision`, `cache_dir`,
    `local_files_only` and `token` concern the Hub alone and mean what they mean in `huggingface_hub.snapshot_download`.

    Raises:
        ModelNotFoundError: nothing of that name; the message lists the nearest names of the zoo.
    """
    name, models = str(name_or_path), zoo()
    try:
        path = Path(name_or_path).expanduser()
        is_folder, is_file = path.is_dir() and bool(name), path.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, a home of nobody, a byte 0: no path at all
        is_folder = is_file = False
    if is_folder:
        return path
    if is_file:
        raise ModelNotFoundError(f"expected a model folder, found a file: {path}")
    if name in models:
        return models[name]
    if _HUB_ID.fullmatch(name):
        return _download(name, revision, cache_dir, local_files_only, token)
    raise ModelNotFoundError(
        f"expected a model folder, a zoo name or a Hub id owner/name, found {name!r}; {_nearest(name, models)}"
    )


def _download(
    name: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool, token: str | bool | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=HUB_PATTERNS,
            ignore_patterns=["*/*"],
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{name!r} is no folder here and could not be had from the Hub ({type(error).__name__}: {reason}); "
            f"{_nearest(name, zoo())}"
        ) from error
    return Path(folder)


def _nearest(name: str, models: Iterable[str]) -> str:
    models = list(models)
    near = difflib.get_close_matches(name.rpartition("/")[2], models, n=3, cutoff=0.4)
    return f"the zoo's nearest: {', '.join(near)}" if near else f"the zoo has: {', '.join(models) or 'no models'}"


# --- files of a folder -----------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of `folder`: with a `model_type`, without a request to run code. Its values the model checks."""
    config = read_json(folder, CONFIG)
    for key in CODE_KEYS:
        if key in config:
            raise UnsafeFileError(
                f"{CONFIG} of {folder} has {key!r}: code that comes with a model is never run; remove the key"
            )
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CheckpointError(
            f"expected a name as 'model_type' in {CONFIG} of {folder}, found {config.get('model_type')!r}"
        )
    return config


def write_manifest(folder: str | Path) -> None:
    """Writes `manifest.json`: the sha256 of each file needed to load the model; `Checkpoint` verifies it if present.

    It finds damage (safetensors has no checksum), not forgery: whoever changes a file can change the manifest.
    """
    folder = Path(folder)
    names = sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix in (".safetensors", ".json") and p.name not in (MANIFEST, "results.json")
    )
    write_atomically(
        folder / MANIFEST, json.dumps({"sha256": {name: file_sha256(folder / name) for name in names}}, indent=2) + "\n"
    )


def verify_manifest(folder: str | Path, *, weights: bool = True) -> None:
    """Raises CheckpointError if a file named by `manifest.json` differs. Without a manifest, nothing is checked.

    Args:
        folder: of the model.
        weights: whether to read the safetensors too.
    """
    if not (Path(folder) / MANIFEST).exists():
        return
    hashes = read_json(folder, MANIFEST).get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(f"expected an object 'sha256' in {MANIFEST} of {folder}, found {type(hashes).__name__}")
    for name, expected in hashes.items():
        if name.endswith(".safetensors") and not weights:
            continue
        found = file_sha256(safe_file(folder, name))
        if found != expected:
            raise CheckpointError(
                f"{name} of {folder} is damaged or was changed: {MANIFEST} has sha256 {expected}, found {found}"
            )


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- to the Hub ------------------------------------------------------------------------------------------------------


def add_companions(folder: Path, origin: str, card: str) -> None:
    """Lays beside the weights in `folder` what a user needs with them, from the folder they were loaded from.

    Args:
        folder: of the weights and their config.
        origin: the folder, zoo name or Hub id that the model came from, if any.
        card: the text of `README.md` where the card of `origin` does not hold for these weights.
    """
    try:
        source = resolve(origin, local_files_only=True)
    except ModelNotFoundError:
        source = None
    if source is not None:
        companions = {"preprocessor_config.json", "processor_config.json", "recipe.resolved.yaml"}
        if _same_weights(folder, source):
            companions |= {"README.md", "results.json", "metrics.json"}
        for entry in source.iterdir():
            if entry.name in companions:
                shutil.copyfile(safe_file(source, entry.name), folder / entry.name)
    if not (folder / "README.md").exists():
        write_atomically(folder / "README.md", card)


def _same_weights(folder: Path, other: Path) -> bool:
    try:
        ours, theirs = Checkpoint(folder), Checkpoint(other)
    except (OSError, ValueError):
        return False
    if ours.shapes != theirs.shapes or ours.dtypes != theirs.dtypes:
        return False
    return all(ours.read(name).equal(theirs.read(name)) for name in ours.shapes)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Uploads a model folder in one commit, making the repository where there is none; returns the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[*HUB_PATTERNS, "*.yaml"],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    ).commit_url


# --- weights ---------------------------------------------------------------------------------------------------------


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
        if self.weights in names and INDEX in names:
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
        except (SafetensorError, OSError, ValueError, LookupError) as error:
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
