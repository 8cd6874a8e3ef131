"""The zoo: one paper, one file. Every file of this folder is imported, and registers itself."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import hub
from ..data import TabularProcessor, VisionProcessor
from ..naming import nearest
from ._base import REGISTRY, MultiTaskConfig, MultiTaskModel

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


class AutoModelForMultiTask:
    """Loads any model of the zoo; the folder's config says which."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **kwargs: Any) -> MultiTaskModel:
        """See `MultiTaskModel.from_pretrained`; `tasks=["ctr"]` reads only what that task needs."""
        return _class_of(name_or_path, kwargs).from_pretrained(name_or_path, **kwargs)

    @staticmethod
    def from_config(config: MultiTaskConfig) -> MultiTaskModel:
        """A model with fresh weights."""
        return model_class(config.model_type)(config)


class AutoProcessor:
    """Loads the processor of any model of the zoo: of rows or of images, the folder's config says which."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **kwargs: Any) -> TabularProcessor | VisionProcessor:
        """See `TabularProcessor.from_pretrained`."""
        return _class_of(name_or_path, kwargs).processor_class.from_pretrained(name_or_path, **kwargs)


def _class_of(name_or_path: str | Path, kwargs: Mapping[str, Any]) -> type[MultiTaskModel]:
    where = ("revision", "cache_dir", "local_files_only", "token")
    folder = hub.resolve(name_or_path, **{key: kwargs[key] for key in where if key in kwargs})
    if hub.is_text_model(folder):
        adapter = (folder / hub.ADAPTER).is_file()
        found = "an adapter; load it with moe_mtl.load_adapter" if adapter else "a language model of transformers"
        raise ValueError(f"expected a model of tables or images, found in {folder} {found}")
    return model_class(hub.read_config(folder)["model_type"])


def model_class(model_type: str) -> type[MultiTaskModel]:
    """The class of a model type; an unknown one is a ValueError that names the nearest."""
    if model_type not in REGISTRY:
        raise ValueError(f"unknown model type {model_type!r}{nearest(model_type, REGISTRY)}")
    return REGISTRY[model_type]


__all__ = ["REGISTRY", "AutoModelForMultiTask", "AutoProcessor", "MultiTaskConfig", "MultiTaskModel", "model_class"]
