"""Mixture-of-Experts models for multi-task learning: load, fine-tune, run one task alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import TabularProcessor, VisionProcessor
    from .models import AutoModelForMultiTask, AutoProcessor
    from .outputs import MultiTaskOutput, Routing
    from .tasks import Task
    from .tuners import extract_task, load_adapter

__version__ = "0.1.0"

_HOME = {
    "AutoModelForMultiTask": ".models",
    "AutoProcessor": ".models",
    "MultiTaskOutput": ".outputs",
    "Routing": ".outputs",
    "TabularProcessor": ".data",
    "Task": ".tasks",
    "VisionProcessor": ".data",
    "extract_task": ".tuners",
    "load_adapter": ".tuners",
}

__all__ = [
    "AutoModelForMultiTask",
    "AutoProcessor",
    "MultiTaskOutput",
    "Routing",
    "TabularProcessor",
    "Task",
    "VisionProcessor",
    "extract_task",
    "load_adapter",
]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'moe_mtl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
