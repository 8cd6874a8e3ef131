"""Before anything else is imported: without a GPU the Triton kernels run in Triton's interpreter."""

import os
from importlib.metadata import version

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    """Two passes run, with other versions of these: which ones, the log must tell."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "triton", "numpy"))
