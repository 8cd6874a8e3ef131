"""PEFT's own `tests/testing_common.py`, taken from the source release of the installed version, over every method.

Every skip must be in the list below, and everything in the list must be skipped.
"""

from pathlib import Path

import peft
import pytest
from upstream_release import fetched, run

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
    passed = run(HERE / "peft_suite.py", upstream, tmp_path, EXPECTED_SKIPS)
    assert set(passed) == {str(name) for name in METHODS.values()}
    assert min(passed.values()) > 20, passed
