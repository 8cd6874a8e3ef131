"""Tests of another library, taken from the source release of the version that is installed, and run over what is ours.

They are fetched with pip at the first run and kept in pytest's cache; nothing of them is kept in this repository.
"""

import fnmatch
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
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


def run(
    suite: Path, upstream: Path, folder: Path, expected_skips: Mapping[str, Sequence[str]], **environment: str
) -> dict[str, int]:
    """Runs a suite in a process of its own, as upstream's helpers set global state.

    Args:
        suite: the file with the classes `Test_<subject>`.
        upstream: from `fetched`.
        folder: an empty one to run in.
        expected_skips: by reason patterns of `<subject>: <test>`. Each must fit a test, which must be skipped; no
            other may be, and none may fail.
        environment: beside what both suites need.

    Returns:
        how many tests of each subject passed.
    """
    (folder / "pytest.ini").write_text("[pytest]\n")
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", str(suite), "-q", "-c", "pytest.ini", "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", "-p", "no:warnings", f"--junitxml={report}"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "RUN_"))}
    inherited |= {
        "PYTHONPATH": os.pathsep.join([str(upstream), str(suite.parent), str(Path(__file__).parents[1])]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=900)
    assert report.exists(), done.stdout + done.stderr

    patterns = {pattern for group in expected_skips.values() for pattern in group}
    wrong, matched = [], set()
    passed: dict[str, int] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        subject = case.attrib["classname"].rpartition("Test_")[2]
        label = f"{subject}: {case.attrib['name']}"
        expected = {pattern for pattern in patterns if fnmatch.fnmatchcase(label, pattern)}
        matched |= expected
        problem = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        skip = case.find("skipped")
        if problem is not None:
            wrong.append(f"{label} failed: {problem.attrib['message'][:500]}")
        elif skip is not None and not expected:
            wrong.append(f"{label} was skipped, which no list expects: {skip.attrib['message'][:200]}")
        elif skip is None and expected:
            wrong.append(f"{label} passed; take it off the list of skips")
        passed[subject] = passed.get(subject, 0) + (skip is None and problem is None)
    assert not wrong, "\n".join(wrong)
    assert matched == patterns, f"on the list, but no such test: {patterns - matched}"
    return passed
