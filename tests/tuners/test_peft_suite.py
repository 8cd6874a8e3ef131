"""PEFT's own `tests/testing_common.py`, taken from the source release of the installed version, over every method.

Every skip must be in the list below, and everything in the list must be skipped.
"""

import fnmatch
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import peft
import pytest
from upstream_release import fetched

from moe_mtl.tuners import METHODS

HERE = Path(__file__).parent
FILES = ("testing_common.py", "testing_utils.py")
STUBS = {
    "__init__.py": "",
    # Imported for tests of image models, which are no part of this.
    "../diffusers/__init__.py": "class StableDiffusionPipeline:\n    pass\n",
}
EXPECTED_SKIPS: dict[str, list[str]] = {
    "one adapter per sample is LoRA's alone; here it is one task per sample": [
        "*: test_generate_with_mixed_adapter_batches_and_beam_search",
        "*: test_mixed_adapter_batches",
    ],
    "of prompt learning, or of LoRA and IA3 by name": [
        "*: test_training_prompt_learning_tasks",
        "*: test_weighted_combination_of_adapters",
    ],
}


@pytest.fixture(scope="module")
def upstream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `upstream`."""
    return fetched(request, tmp_path_factory.mktemp("download"), "peft", peft.__version__, FILES, STUBS)


def test_upstream_suite(upstream: Path, tmp_path: Path) -> None:
    """In a process of its own: upstream's helpers set global state."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(HERE / "peft_suite.py"), "-q", "-c", "pytest.ini"]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "no:warnings", f"--junitxml={report}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "RUN_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(upstream), str(HERE.parents[1])]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert report.exists(), run.stdout + run.stderr

    wrong, passed, matched = [], dict.fromkeys(map(str, METHODS.values()), 0), set()
    for case in ElementTree.parse(report).iter("testcase"):
        method, name = case.attrib["classname"].rpartition("Test_")[2], case.attrib["name"]
        label = f"{method}: {name}"
        expected = [
            pattern for group in EXPECTED_SKIPS.values() for pattern in group if fnmatch.fnmatchcase(label, pattern)
        ]
        matched.update(expected)
        problem = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        skip = case.find("skipped")
        if problem is not None:
            wrong.append(f"{label} failed: {problem.attrib['message'][:500]}")
        elif skip is not None and not expected:
            wrong.append(f"{label} was skipped, which no list expects: {skip.attrib['message'][:200]}")
        elif skip is None and expected:
            wrong.append(f"{label} passed; take it off the list of skips")
        passed[method] += skip is None and problem is None
    assert not wrong, "\n".join(wrong)
    patterns = {pattern for group in EXPECTED_SKIPS.values() for pattern in group}
    assert matched == patterns, f"on the list, but no such test: {patterns - matched}"
    assert min(passed.values()) > 20, passed
