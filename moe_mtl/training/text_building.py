"""From a recipe's model section to a language model and its tokeniser: new, saved, or saved with an adapter on it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, ByT5Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..hub import ADAPTER, zoo_or
from ..naming import nearest
from ..tuners import RankConfig, load_adapter
from ..tuners.lori import sparsify
from .building import freeze
from .recipe import AdapterSection, ModelSection, Recipe, RecipeError


def build_text(recipe: Recipe, tasks: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """The model to train, its tokeniser, and the tasks in the order of their numbers.

    Args:
        recipe: whose `model` section says what to make.
        tasks: of the data.

    Raises:
        RecipeError: a model type, field, method or option that does not exist; tasks that a saved adapter lacks.
    """
    section = recipe.model
    if section.source is None:
        model, tokenizer = _new(section)
        freeze(model, section.freeze, set())
        return model, tokenizer, list(tasks)
    if section.config:
        key = next(iter(section.config))
        raise RecipeError(f"section 'model': unknown key {key!r}: the config of a saved language model is not changed")
    where = zoo_or(section.source)
    known = list(tasks)
    if (Path(where) / ADAPTER).is_file():
        if section.adapter is not None:
            raise RecipeError(f"model.adapter: expected none, as {section.source} is an adapter itself")
        if section.dtype is not None or section.quantization is not None:
            raise RecipeError(
                f"model.dtype, model.quantization: expected none, as {section.source} is an adapter itself"
            )
        model = load_adapter(section.source, is_trainable=True)
        own = getattr(model.active_peft_config, "tasks", None)
        if own is not None and (missing := [task for task in tasks if task not in own]):
            raise RecipeError(
                f"model.from: the adapter {section.source} has no task {missing[0]!r}{nearest(missing[0], own)}"
            )
        known = known if own is None else list(own)
        if section.sparsity is not None:
            try:
                sparsify(model, 1 - section.sparsity)
            except ValueError as error:
                raise RecipeError(f"model.sparsity: {error}") from None
    else:
        if section.sparsity is not None:
            raise RecipeError(f"model.sparsity: expected model.from to be a LoRI adapter, found {section.source}")
        model = base_model(section, recipe.train.gradient_checkpointing)
        if section.adapter is not None:
            model = _adapted(model, section.adapter, tasks)
            model.peft_config["default"].base_model_name_or_path = section.source
    freeze(model, section.freeze, set())
    tokenizer = AutoTokenizer.from_pretrained(where)
    return model, tokenizer, known


def _new(section: ModelSection) -> tuple[Any, Any]:
    """Of bytes: a new model has no vocabulary of its own."""
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    if section.type not in known:
        raise RecipeError(
            f"model.type: expected a causal language model of transformers, found {section.type!r}"
            f"{nearest(str(section.type), known)}"
        )
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config_class = CONFIG_MAPPING[section.type]
    fields = config_class.__dataclass_fields__
    for key in section.config:
        if key not in fields:
            raise RecipeError(
                f"section 'model': unknown key {key!r}: {section.type} has no such field{nearest(key, fields)}"
            )
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    try:
        config = config_class(**ids | {"eos_token_id": tokenizer.eos_token_id} | section.config)
        return AutoModelForCausalLM.from_config(config), tokenizer
    except (StrictDataclassError, ValueError) as error:
        raise RecipeError(f"section 'model': {' '.join(str(error.__cause__ or error).split())}") from None


def base_model(section: ModelSection, checkpointing: bool = False) -> Any:
    """The saved language model of a recipe, in the dtype and quantisation that it asks for."""
    where = zoo_or(str(section.source))
    options: dict[str, Any] = {"use_safetensors": True}
    if section.dtype is not None:
        options["dtype"] = getattr(torch, section.dtype)
    if section.quantization is None:
        return AutoModelForCausalLM.from_pretrained(where, **options)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("model.quantization: bitsandbytes is not installed: pip install 'moe_mtl[instruct]'")
    compute = getattr(torch, section.dtype or "bfloat16")
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_8bit=section.quantization == "8bit",
        load_in_4bit=section.quantization == "4bit",
        # QLoRA (Dettmers et al., NeurIPS 2023): normal floats, and their scales quantised too.
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    base = AutoModelForCausalLM.from_pretrained(where, **options)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)


def _adapted(base: Any, section: AdapterSection, tasks: Sequence[str]) -> PeftModel:
    known = {str(getattr(name, "value", name)): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = section.method.upper().replace("-", "_")
    if method not in known:
        names = [name.lower() for name in known]
        raise RecipeError(f"model.adapter.method: unknown method {section.method!r}{nearest(section.method, names)}")
    config_class = known[method]
    fields = config_class.__dataclass_fields__
    for key in section.config:
        if key not in fields or key in ("tasks", "task_type", "peft_type"):
            why = "comes from the data" if key in fields else "has no such field"
            raise RecipeError(f"model.adapter: unknown key {key!r}: {section.method} {why}{nearest(key, fields)}")
    given: dict[str, Any] = {"task_type": "CAUSAL_LM"} | (
        {"target_modules": "all-linear"} if "target_modules" in fields else {}
    )
    given |= section.config
    kind: Any = config_class.adapter_class if issubclass(config_class, RankConfig) else None
    if kind is not None and (kind.by_task or kind.by_preference):
        given["tasks"] = list(tasks)
    if method == "POLY":
        given.setdefault("n_tasks", len(tasks))
    try:
        return get_peft_model(base, config_class(**given))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.adapter: {' '.join(str(error).split())}") from None
