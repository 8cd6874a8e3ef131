"""Where numbers were made: what a record says of processor and packages, and whether this process has the same."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from .record import family

PACKAGES = {"table": ("torch", "transformers", "torchjd"), "vision model": ("torch", "transformers", "scikit-image")}
OF_TEXT = ("torch", "transformers", "peft")
_CPU = "CPU core"


def hardware() -> str:
    """What training runs on here. Of a processor what decides how sums are ordered: vector instructions and threads."""
    import torch

    if torch.accelerator.is_available():
        return (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.accelerator.current_accelerator()}"
        )
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{_count(cores, _CPU)} ({platform.machine()}, {instructions}), {_count(threads, 'thread')}"


def packages(of: str) -> dict[str, str]:
    """Versions of what the numbers of a family of models depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES.get(of, OF_TEXT)}}


def made_as_here(record: Mapping[str, Any]) -> bool:
    """Whether a record was made by the same packages on a processor of the same kind: then its numbers come again."""
    return (
        _CPU in record["hardware"]
        and record["hardware"] == hardware()
        and record["packages"] == packages(family(record))
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
