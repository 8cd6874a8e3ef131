"""What all processors share: one JSON file beside the model, read without trusting who wrote it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..files import MAX_JSON_BYTES, read_json, write_atomically
from .errors import DataError

FILE = "preprocessor_config.json"


class SavedProcessor:
    """A processor that is its `to_dict`: saved, loaded and compared by it."""

    advice = ""  # what to do about a file too large to be read again

    def to_dict(self) -> dict[str, Any]:
        """All that the processor is, as JSON types."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        raise NotImplementedError

    def for_tasks(self, tasks: Sequence[str]) -> "SavedProcessor":
        """The processor of the model that answers only `tasks`."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Writes `preprocessor_config.json` into `folder`, whole or not at all. Returns the path written.

        Raises:
            DataError: see `to_json`.
            OSError: the folder cannot be written, the disk is full.
        """
        content = self.to_json()
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        return [str(path)]

    def to_json(self) -> bytes:
        """What `preprocessor_config.json` holds. Raises DataError if that is more than would be read again."""
        content = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        if len(content) > MAX_JSON_BYTES:
            raise DataError(f"{FILE}: expected at most {MAX_JSON_BYTES:,} bytes, found {len(content):,}{self.advice}")
        return content

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        trust_remote_code: bool | None = False,
        _from_auto: bool = False,
    ) -> Self:
        """Loads what `save_pretrained` wrote.

        Args:
            name_or_path: a folder, a zoo name or a Hub id.
            revision, cache_dir, local_files_only, token: of a Hub repository, see `hub.resolve`.
            trust_remote_code: must be false: a processor is data, no code comes with it (transformers passes this
                along).

        Raises:
            FileNotFoundError: there is no such folder or file.
            UnsafeFileError: the file is a link that leads out of the folder.
            CheckpointError: no JSON, a key that stands twice, more than 32 MiB, or not what the folder's manifest says.
            DataError: the file is not what `save_pretrained` writes, by field.
        """
        if trust_remote_code:
            raise DataError("trust_remote_code: expected false; a processor holds no code")
        from ..hub import resolve, verify_manifest

        folder = resolve(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        verify_manifest(folder, weights=False)
        return cls.from_dict(read_json(folder, FILE))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]
