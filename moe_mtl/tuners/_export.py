"""From an adapter of many tasks to what one task needs: a plain LoRA that runs where moe_mtl is not installed."""

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import ParamWrapper as LoraParameter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ..checkpoint import Checkpoint
from ..files import CheckpointError, UnsafeFileError
from ..hub import ADAPTER, ADAPTER_WEIGHTS, resolve, zoo_or
from ._base import RankConfig, RankLayer
from ._parameters import ParamWrapper
from ._tasks import Preference, Told, weights_of


def extract_task(
    model: PeftModel,
    task: str | None = None,
    adapter_name: str | None = None,
    *,
    preference: Preference | None = None,
) -> PeftModel:
    """One task's adapter as a LoRA of PEFT, on the same base weights, which both models then share.

    Args:
        model: with an adapter of this package.
        task: its name; None for methods that do not tell tasks apart.
        adapter_name: which adapter, by default the active one.
        preference: for methods that mix tasks, the weight of each: by name, or in the order of the config's tasks. A
            task instead stands for all of the weight on it.

    Returns:
        a model of the same class whose adapter is a LoRA named "default": `save_pretrained`, `merge_and_unload` and all
        else as PEFT has it. Its output equals that of the whole model for the task, up to rounding in float32.

    Raises:
        NotImplementedError: what the adapter computes depends on the input; says how.
        ValueError: an unknown adapter or task, or no preference where one is asked for.
    """
    name = adapter_name or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"adapter_name: expected one of {', '.join(model.peft_config)}, found {name!r}")
    config: Any = model.peft_config[name]
    layers = {_key(key, layer): layer for key, layer in _layers(model.get_base_model(), RankLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError("expected adapters beside the weights, found them merged; call unmerge_adapter first")
    told: Told | None = task
    if config.adapter_class.by_preference:
        if preference is None and task is not None:
            preference = {name: float(name == task) for name in (*config.tasks, task)}
        if preference is None:
            raise ValueError(f"preference: expected a weight for each of {', '.join(config.tasks)}, found none")
        weights = weights_of(preference, config.tasks)
        if weights.dim() != 1:
            raise ValueError(f"preference: expected one of shape [{len(config.tasks)}], found {list(weights.shape)}")
        told = tuple(zip(config.tasks, weights.tolist(), strict=True))
    with torch.no_grad():
        pairs = {key: layer.lora_of(name, told) for key, layer in layers.items() if name in layer.moe_adapters}
    # The weights of the base model are shared, not copied. What PEFT freezes on the way is to stay as it was.
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    copied.set_adapter(name)
    base = copied.unload()
    ranks = {key: a_RD.shape[-2] for key, (a_RD, _) in pairs.items()}  # of one expert where there are several
    rank = max(ranks.values())
    others = {key: own for key, own in ranks.items() if own != rank}
    lora = get_peft_model(
        base,
        LoraConfig(
            task_type=config.task_type,
            r=rank,
            lora_alpha=rank * config.scale,
            rank_pattern={_exactly(key): own for key, own in others.items()},
            alpha_pattern={_exactly(key): own * config.scale for key, own in others.items()},
            target_modules=[key for key, (a_RD, _) in pairs.items() if a_RD.dim() == 2],
            target_parameters=[key for key, (a_RD, _) in pairs.items() if a_RD.dim() == 3] or None,
            modules_to_save=config.modules_to_save,
            bias=config.bias,
        ),
    )
    lora.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    for key, layer in _layers(lora.get_base_model(), LoraLayer):
        if _key(key, layer) in pairs:
            for projection, weight in zip(("lora_A", "lora_B"), _flat(*pairs[_key(key, layer)]), strict=True):
                parameter = getattr(layer, projection)["default"].weight
                parameter.data = weight.to(parameter.device, parameter.dtype).contiguous()
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
    return lora.eval()


def load_adapter(
    name: str | Path,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **options: Any,
) -> PeftModel:
    """A saved adapter on its base model, in a process where importing this package has made its method known.

    Args:
        name: zoo name, folder or Hub id of the adapter.
        model: the base model; by default the one that the adapter names, from the zoo, a folder or the Hub.
        revision, cache_dir, local_files_only, token: of the adapter on the Hub, see `moe_mtl.hub.resolve`.
        options: further ones of PEFT's `PeftModel.from_pretrained`, like `is_trainable`.

    Raises:
        TypeError: `subfolder`, whose weights would not be checked; name the folder itself.
        ModelNotFoundError: there is no such folder.
        ValueError: the folder holds no adapter, or one that does not name its base model.
        UnsafeFileError: its weights are no safetensors.
        CheckpointError: its files were damaged, a weight is NaN or infinite, tensors are missing, left over, or of
            other shapes than on this base model. PEFT alone warns of the missing and is silent on the others.
    """
    if "subfolder" in options:
        raise TypeError(f"subfolder: expected none, found {options['subfolder']!r}; name the folder of the adapter")
    folder = resolve(name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    if not (folder / ADAPTER).is_file():
        raise ValueError(f"expected the folder of an adapter, with {ADAPTER}, found {folder}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UnsafeFileError(f"expected {ADAPTER_WEIGHTS} in {folder}, found none; pickles are not read")
    checkpoint = Checkpoint(folder, weights=ADAPTER_WEIGHTS)
    for tensor in checkpoint.shapes:
        checkpoint.read(tensor)  # which looks for NaN
    config: Any = PeftConfig.from_pretrained(str(folder))
    if model is None:
        base, kind = config.base_model_name_or_path, str(getattr(config.task_type, "value", config.task_type))
        classes = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}
        if not base or kind not in classes:
            found = f"{base!r} and {kind}"
            raise ValueError(f"model: expected the base model, as {folder} does not say which language model: {found}")
        model = classes[kind].from_pretrained(zoo_or(base), use_safetensors=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
            loaded = PeftModel.from_pretrained(model, str(folder), config=config, **options)
    except KeyError as error:  # PEFT asks for what `modules_to_save` names without looking
        raise CheckpointError(f"{ADAPTER_WEIGHTS} of {folder}: tensor missing, {error}") from error
    except (RuntimeError, UserWarning) as error:
        found = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        if "size mismatch" not in found and "missing adapter keys" not in found:
            raise
        raise CheckpointError(f"{ADAPTER_WEIGHTS} of {folder} does not fit the base model: {found:.300}") from error
    name_of_it = options.get("adapter_name", "default")
    own, all_known = (
        get_peft_model_state_dict(loaded, adapter_name=name_of_it, save_embedding_layers=embeddings)
        for embeddings in (False, True)
    )
    missing, left = sorted(own.keys() - checkpoint.shapes), sorted(checkpoint.shapes.keys() - all_known)
    if not isinstance(config, RankConfig):
        # PEFT renames tensors of older versions and stacks those of single experts: where it may have, count.
        single = any(".experts." in tensor for tensor in left)
        missing, left = [], left if len(left) > len(missing) and not single else []
    if missing:  # base weights, biases and saved modules, which PEFT does not miss
        raise CheckpointError(f"{ADAPTER_WEIGHTS} of {folder}: {len(missing)} tensors missing, first {missing[0]}")
    if left:
        raise CheckpointError(f"{ADAPTER_WEIGHTS} of {folder}: no place for {len(left)} tensors, first {left[0]}")
    return loaded


def _layers(base: nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
    return ((key, module) for key, module in base.named_modules() if isinstance(module, kind))


def _key(key: str, layer: Any) -> str:
    """Of an adapter on a parameter that parameter's name, whatever is wrapped around its module."""
    if not isinstance(layer, (ParamWrapper, LoraParameter)):
        return key
    return f"{key.replace('.base_layer', '')}.{layer.parameter_name}"


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of stacked experts as PEFT stores them: `A [E R, D]`, `B [O, R E]`."""
    return (a, b) if a.dim() == 2 else (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def _exactly(key: str) -> str:
    """A pattern of PEFT, which puts `(.*\\.)?` before it, that fits this layer alone."""
    return "^" + re.escape(key)
