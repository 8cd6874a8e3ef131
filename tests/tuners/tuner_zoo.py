"""Small base models, and adapters of every registered method on them.

Nothing here names a method: a new file in `moe_mtl/tuners` is found among `METHODS` and gets all common tests.
"""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moe_mtl.tuners import METHODS, RankConfig
from moe_mtl.tuners._balance import BalancedConfig

TASKS = ["sql", "chat", "code"]
CONFIGS = sorted(METHODS, key=lambda config: config.__name__)
BY_TASK = [config for config in CONFIGS if config.adapter_class.by_task]
PREFERENCES = {"sql": [0.7, 0.1, 0.2], "chat": [0.0, 0.5, 0.5], "code": [0.25, 0.25, 0.5]}
MERGEABLE = [config for config in CONFIGS if not config.adapter_class.depends_on_input]


def config_of(config_class: type[RankConfig], **options: Any) -> RankConfig:
    adapter = config_class.adapter_class
    tasks = {"tasks": TASKS} if adapter.by_task or adapter.by_preference else {}
    selected = {"num_selected": 2} if issubclass(config_class, BalancedConfig) else {}
    experts = {"num_experts": 3} if hasattr(config_class, "num_experts") else {}
    return config_class(**({"r": 4, "alpha": 8.0, "init_weights": False} | tasks | selected | experts | options))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**(sizes | {"vocab_size": 40, "tie_word_embeddings": False} | options))
    return LlamaForCausalLM(config).eval()


def targets_of(config_class: type[RankConfig]) -> list[str]:
    """Of two kinds at least; a feed-forward block for a method that takes those."""
    takes_blocks = config_class.layer_class is not RankConfig.layer_class
    return ["q_proj", "v_proj", "mlp" if takes_blocks else "down_proj"]


def adapted(config_class: type[RankConfig], **options: Any) -> PeftModel:
    config = config_of(
        config_class, **({"target_modules": targets_of(config_class), "task_type": "CAUSAL_LM"} | options)
    )
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, config).eval()


def batch(samples: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (samples, 5), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def tasks_for(config_class: type[RankConfig], tasks: list[str]) -> dict[str, Any]:
    """What a call of a method takes, one per sample; a preference each for methods that take those."""
    if config_class.adapter_class.by_preference:
        return {"preference": torch.tensor([PREFERENCES[task] for task in tasks])}
    return {"tasks": tasks} if config_class.adapter_class.by_task else {}


def one_task(config_class: type[RankConfig], task: str) -> dict[str, Any]:
    """What `extract_task` takes."""
    if config_class.adapter_class.by_preference:
        return {"preference": PREFERENCES[task]}
    return {"task": task} if config_class.adapter_class.by_task else {}


def choose(model: PeftModel, config_class: type[RankConfig], task: str | None) -> None:
    """For all calls that say nothing; None takes it back."""
    if config_class.adapter_class.by_preference:
        model.set_preference(None if task is None else PREFERENCES[task])
    elif config_class.adapter_class.by_task:
        model.set_task(task)
