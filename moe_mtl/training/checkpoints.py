"""Checkpoints that are whole or not there: folders `checkpoint-<step>`, written beside their place and renamed.

Their manifest holds the sha256 of every file and is written last, so a folder without a matching one was not finished.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import CheckpointError, staged_folder
from ..hub import ADAPTER, CONFIG, MANIFEST, verify_manifest

PREFIX = "checkpoint-"
# Without any of these a resumed run would silently differ from one that was not interrupted.
REQUIRED = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
_STALE = re.compile(rf"\.{PREFIX}\d+\.(staging|old)-[0-9a-f]+")


@contextmanager
def writing_checkpoint(folder: Path) -> Iterator[Path]:
    """Yields a staging folder that becomes `folder`, with a manifest, when the block ends well.

    Raises:
        OSError: the disk is full; nothing of the new checkpoint is left, and older ones are untouched.
    """
    with staged_folder(folder) as staging:
        yield staging
        hashes = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1) + "\n", encoding="utf-8")


def verify_checkpoint(folder: str | Path) -> Path:
    """The folder, if training can be resumed from it exactly.

    Raises:
        CheckpointError: it is not complete, or a file differs from what was written; the message names the file.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"expected a complete checkpoint at {folder}, found no {MANIFEST}: it was not written to its end"
        )
    names = {path.name for path in folder.iterdir()}
    absent = [name for name in REQUIRED if name not in names]
    if not names & {CONFIG, ADAPTER}:
        absent.insert(0, CONFIG)
    if not any(re.fullmatch(r"rng_state(_\d+)?\.pth", name) for name in names):
        absent.append("rng_state.pth")
    if not any(name.endswith(".safetensors") for name in names):
        absent.append("model.safetensors")
    if absent:
        raise CheckpointError(f"checkpoint {folder} cannot be resumed from: it lacks {', '.join(absent)}")
    verify_manifest(folder)
    return folder


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, the earliest first, complete or not."""
    found = [path for path in Path(folder).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The latest checkpoint that can be resumed from, or None; damaged ones are passed over with a warning."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return verify_checkpoint(path)
        except (CheckpointError, OSError) as error:
            warnings.warn(f"passing over a checkpoint: {error}", stacklevel=2)
    return None


def keep_last_checkpoints(folder: str | Path, keep: int) -> None:
    """Removes all but the latest `keep` checkpoints."""
    for path in checkpoints_in(folder)[:-keep] if keep else checkpoints_in(folder):
        shutil.rmtree(path)


def remove_stale_staging(folder: str | Path) -> None:
    """Removes what interrupted writes of checkpoints left behind."""
    for path in Path(folder).glob(f".{PREFIX}*"):
        if _STALE.fullmatch(path.name):
            shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
