"""Test files of another library, taken from the source release of the version that is installed.

They are fetched with pip at the first run and kept in pytest's cache; nothing of them is kept in this repository.
"""

import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


def unavailable(what: str, reason: str) -> None:
    """A skip on a desk without a network; where `CI` is set, a failure: there the suite must run."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what}'s tests could not be had: {reason}")


def fetched(
    request: pytest.FixtureRequest,
    made: Path,
    library: str,
    version: str,
    files: Sequence[str],
    stubs: Mapping[str, str],
) -> Path:
    """A folder with the package `upstream`.

    Args:
        request: of the fixture that asks.
        made: an empty folder to download to.
        library, version: of the release.
        files: of its folder `tests`.
        stubs: files to write beside them, name and text; a name that begins with `../` lies beside the package.
    """
    folder = request.config.cache.mkdir(f"{library}-tests") / version
    if folder.is_dir():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", f"{library}=={version}", "--dest", str(made)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        unavailable(f"{library} {version}", "pip took more than 300 s")
    if run.returncode:
        unavailable(f"{library} {version}", (run.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    package = folder.with_name(f"{version}.{os.getpid()}") / "upstream"
    for name, text in stubs.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    with tarfile.open(made / f"{library}-{version}.tar.gz") as archive:
        for name in files:
            member = archive.extractfile(f"{library}-{version}/tests/{name}")
            (package / name).write_bytes(member.read())
    package.parent.rename(folder)
    return folder
