"""Files written whole or not at all, and read without trusting who wrote them.

Writing: beside their place, flushed to the disk, then renamed. POSIX promises that `rename` within one file system is
atomic, not that the bytes were written before it: hence the `fsync`s.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# What a save writes, and so may replace. Every other entry of a folder is its owner's, and outlives a save.
MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "manifest.json",
    "metrics.json",
    "recipe.resolved.yaml",
)
# What training leaves beside a model: a folder that holds only this is ours too, though a save must keep it.
TRAINING_FILES = ("checkpoint-*", "logs", "runs", "README.md", "curves.svg", "results.json", "report.html")
MAX_JSON_BYTES = 32 * 2**20


def file_state(stat: os.stat_result) -> tuple[int, ...]:
    """What differs once another file has that name, or it was written to, unless its times were set back."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class ModelNotFoundError(FileNotFoundError):
    """A name that is no folder, no zoo model and no Hub id; or a folder without the file asked for."""


class UnsafeFileError(ValueError):
    """A folder that asks for what is never done: unpickle, run its code, read outside it."""


class CheckpointError(ValueError):
    """Files that contradict themselves, each other or the model: truncated, incomplete, of other shapes, not finite."""


# --- writing ---


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes `content` (text as UTF-8) to `path`, replacing what was there. A failure leaves the old file as it was.

    Raises:
        OSError: the disk is full, the folder is missing or not writable.
    """
    with appearing_file(path) as temporary, open(temporary, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing_file(path: str | Path) -> Iterator[Path]:
    """Yields an unused name beside `path`. The file written there takes the place of `path` when the block ends well,
    and is gone otherwise; the block flushes it to the disk.

    Raises:
        OSError: see `require_writable`; the disk is full.
    """
    path = Path(path)
    require_writable(path)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename = str(path)  # the name that the user gave
        raise


def require_writable(path: str | Path) -> None:
    """Raises IsADirectoryError if `path` is a folder, FileNotFoundError if there is no folder to write it into."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, found a folder: {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")


@contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; when the block ends well, its content becomes `target` by rename.

    What stood in `target` is replaced only where it is a saved model, an empty folder or a run of training: its
    model files go, all else (notes, `checkpoint-*`, a README that was not written anew) is moved into the new folder.
    If the block raises, or the disk is full, `target` is as it was and the staging folder is gone.

    Raises:
        FileExistsError: `target` holds something else, or is a file; raised before anything is written.
        OSError: the disk is full or the parent is not writable.
    """
    target = Path(target).resolve()
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(target, "staging")
    staging.mkdir()
    try:
        yield staging
        _sync_tree(staging)
        require_replaceable(target)
        _swap(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def replaced_files(folder: str | Path, superseded: tuple[str, ...]) -> Iterator[Path]:
    """Yields an empty folder within `folder`; when the block ends well, its files move into `folder` by rename.

    Files of `folder` that match `superseded` and were not written anew go; all others stay.

    Raises:
        FileExistsError: `folder` is a file.
        OSError: the disk is full; `folder` is as it was.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected a folder to save into, found a file: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    staging = _beside(folder / "model", "staging")
    staging.mkdir()
    try:
        yield staging
        _sync_tree(staging)
        written = sorted(entry.name for entry in staging.iterdir())
        for name in written:
            os.replace(staging / name, folder / name)
        for entry in folder.iterdir():
            if entry.name not in written and entry.is_file() and _matches(entry, superseded):
                entry.unlink()
        _sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
        _sync_folder(target.parent)
        return
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old, target)
        raise
    try:
        _sync_folder(target.parent)
        for entry in old.iterdir():
            if (target / entry.name).exists() or _matches(entry, MODEL_FILES):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            else:
                os.rename(entry, target / entry.name)
        old.rmdir()  # never rmtree: whatever arrived meanwhile is not ours to delete
        _sync_folder(target)
    except OSError as error:
        error.add_note(f"{target} is saved; what stood there before is in {old}")
        raise


def require_replaceable(target: str | Path) -> None:
    """Raises FileExistsError if `target` is a file, or a folder that holds what no save of ours has left there."""
    target = Path(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"expected a folder to save into, found a file: {target}")
    foreign = sorted(e.name for e in target.iterdir() if not _matches(e, MODEL_FILES + TRAINING_FILES))
    if foreign and not _is_saved_model(target):
        raise FileExistsError(
            f"expected a new or empty folder or a saved model at {target}, found other files in it: "
            f"{', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}; choose another folder"
        )


def _is_saved_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _matches(entry: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(entry.name, pattern) for pattern in patterns)


def _beside(path: Path, purpose: str) -> Path:
    """An unused name on the same file system. Not `tempfile`: its files and folders would stay private to the user."""
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")


def _sync_tree(folder: Path) -> None:
    """All to the disk, and readable by whom the folder lets in: safetensors leaves its files to the user alone."""
    readable = folder.stat().st_mode & 0o666  # mkdir asked the umask; to ask it here would change it for all threads
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
            if name.endswith(".safetensors"):
                os.chmod(Path(root, name), readable)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ---


def safe_file(folder: str | Path, name: str) -> Path:
    """The real path of the file `name` of `folder`, which must lie in it: no separator, no link that leads out of it.

    In the Hub's cache a snapshot consists of links into blob stores; there, and only there, those stores count as the
    folder.

    Raises:
        UnsafeFileError: the name or a link leads elsewhere, or to something that is no regular file.
        ModelNotFoundError: no such file.
    """
    root = Path(folder).resolve()
    if os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise UnsafeFileError(f"expected the name of a file in {root}, found {name!r}")
    try:
        path = (root / name).resolve(strict=True)
    except FileNotFoundError:
        raise ModelNotFoundError(f"expected a file {name} in {root}, found none") from None
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UnsafeFileError(f"{root / name} cannot be followed: {error}") from None
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        repository = root.parent.parent  # <cache>/models--owner--name/snapshots/<commit>
        roots += [repository / "blobs", repository.parent / "blobs"]
    if not any(path.is_relative_to(allowed) for allowed in roots):
        raise UnsafeFileError(f"expected {name} to lie in {root}, found a link to {path}")
    if not path.is_file():
        raise UnsafeFileError(f"expected {root / name} to be a regular file")
    return path


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`: at most 32 MiB, no duplicate keys, no NaN or infinity.

    Raises:
        CheckpointError, UnsafeFileError, ModelNotFoundError: each names the file.
    """
    path = safe_file(folder, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"expected {name} to be at most {MAX_JSON_BYTES:,} bytes, found {size:,}")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected JSON in {name} of {folder}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a JSON object in {name} of {folder}, found {type(content).__name__}")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return content


def _no_constants(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")
