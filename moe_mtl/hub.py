"""A zoo name, a folder or a Hub id -> a checked local folder.

A model folder is data from outside. Nothing here runs code from it or follows a path out of it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import CheckpointError, ModelNotFoundError, UnsafeFileError, read_json, safe_file, write_atomically

WEIGHTS, INDEX, CONFIG, MANIFEST = "model.safetensors", "model.safetensors.index.json", "config.json", "manifest.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_TOKENIZERS = ("chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.md", "recipe.resolved.yaml", *OF_TOKENIZERS]  # never code, never pickles
WEIGHT_FILES = (WEIGHTS, "model-*.safetensors", INDEX)
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

    Of a Hub repository only the safetensors, JSON and Markdown files in its top folder are downloaded, the recipe,
    and what tokenisers keep besides: a chat template, `tokenizer.model`, `merges.txt`, `vocab.txt`. `revision`,
    `cache_dir`, `local_files_only` and `token` concern the Hub alone and mean what they mean in
    `huggingface_hub.snapshot_download`.

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
