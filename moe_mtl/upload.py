"""A saved model, with what makes it usable, to the Hub."""

import shutil
from pathlib import Path

from .checkpoint import Checkpoint
from .files import ModelNotFoundError, safe_file, write_atomically
from .hub import HUB_PATTERNS, resolve


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
