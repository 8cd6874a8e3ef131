"""LoRA experts as PEFT methods: one paper, one file. Every file of this folder is imported, and registers itself.

model = peft.get_peft_model(base, MTLLoraConfig(tasks=["sql", "chat"], target_modules=["q_proj", "v_proj"]))
model(**batch, tasks=["sql", "chat", "chat"])
"""

import importlib
import pkgutil

from ._balance import BalanceRanks
from ._base import METHODS, RankConfig
from ._count import Count, count
from ._export import extract_task, load_adapter
from ._tuner import RankTuner

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

for _config in METHODS:
    globals()[_config.__name__] = _config

__all__ = [
    "METHODS",
    "BalanceRanks",
    "Count",
    "RankConfig",
    "RankTuner",
    "count",
    "extract_task",
    "load_adapter",
    *(config.__name__ for config in METHODS),
]
