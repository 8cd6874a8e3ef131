"""Before anything else is imported: without a GPU the Triton kernels run in Triton's interpreter."""

import os
from importlib.metadata import version
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    """Two passes run, with other versions of these: which ones, the log must tell."""
    names = [name for name in ("torch", "transformers", "triton", "numpy") if find_spec(name) is not None]
    return ", ".join(f"{name} {version(name)}" for name in names)
