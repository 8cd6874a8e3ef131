"""What all models share: tasks in the config, loading, the single-task path, the registry."""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel

from .. import hub
from ..checkpoint import Checkpoint, check_shapes
from ..data import TabularProcessor, VisionProcessor
from ..files import CheckpointError, replaced_files
from ..naming import nearest
from ..tasks import SHARED, Task, check_task_names, parse_tasks
from ..upload import add_companions, upload
from ._loading import load_offloaded, no_progress_bar, refuse_offloaded

REGISTRY: dict[str, type["MultiTaskModel"]] = {}

# What transformers itself hands to a config beyond the declared fields; its Trainer sets `use_cache` on every model's.
_LIBRARY_KEYS = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "attn_implementation",
        "experts_implementation",
        "_commit_hash",
        "model_type",
        "use_cache",
        "tie_word_embeddings",
        "output_attentions",
    }
)
MAX_PARAMETERS = 100_000_000_000

Reader = Callable[[str], Tensor]


class MultiTaskConfig(PreTrainedConfig):
    """Fields and checks of every config here.

    Args:
        tasks: one dict per task, see `moe_mtl.tasks.Task`. A list: JSON would sort a dict.
    """

    tasks: list[dict] = field(default_factory=lambda: [{"name": "task", "kind": "binary"}])
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "last_hidden_state",
        "task_losses",
        "auxiliary_loss",
        "routing",
        "hidden_states",
    ]

    def __post_init__(self, **kwargs: Any) -> None:
        known = sorted(set(self.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__))
        for key in kwargs:
            if key not in self.__dataclass_fields__ and key not in _LIBRARY_KEYS:
                raise ValueError(f"{type(self).__name__}: unknown field {key!r}{nearest(key, known)}")
        super().__post_init__(**kwargs)
        if not self.tasks:
            raise ValueError(f"{type(self).__name__}: tasks must hold at least one task, found none")
        self.tasks = [task.to_dict() for task in parse_tasks(self.tasks)]

    @property
    def parsed_tasks(self) -> list[Task]:
        return parse_tasks(self.tasks)

    @property
    def task_names(self) -> list[str]:
        return [task["name"] for task in self.tasks]

    def for_tasks(self, tasks: Sequence[str], read: Reader | None = None) -> Self:
        """The config of the model that answers only `tasks`; a model with more to leave out overrides `keep_tasks`.

        Args:
            tasks: names; a task that is a product brings its factors along. A sample space that is left behind is
                forgotten: then every labelled row counts.
            read: gives a parameter of the full model by name, for architectures where what is needed depends on
                what was learnt. Without it nothing of that sort is dropped.
        """
        names = check_task_names(tasks, self.task_names)
        kept = set(names)
        for task in self.parsed_tasks:
            if task.name in kept:
                kept.update(task.product_of or ())
        config = copy.deepcopy(self)
        config.tasks = [dict(task) for task in self.tasks if task["name"] in kept]
        for fields in config.tasks:
            if fields.get("space") not in kept:
                fields.pop("space", None)
        self.keep_tasks(config, read)
        config.validate()
        return config

    def keep_tasks(self, config: Self, read: Reader | None) -> None:
        """Sets what else differs in `config`, the copy of this one with fewer tasks."""


class MultiTaskModel(PreTrainedModel):
    """A model that answers several tasks, or any of them without paying for the others."""

    config_class: type[MultiTaskConfig]
    processor_class: ClassVar[type[TabularProcessor] | type[VisionProcessor]]
    base_model_prefix = ""

    @property
    def tasks(self) -> list[str]:
        return self.config.task_names

    def example_inputs(self) -> dict[str, Tensor]:
        """One row of zeros, as the model takes it, on its device."""
        raise NotImplementedError(f"{type(self).__name__} must say what a row looks like")

    def rows_kept(self, config: MultiTaskConfig, name: str) -> list[int] | None:
        """Which rows of this model's tensor `name` the model of `config` keeps: None for all."""
        return None

    def extract_task(self, tasks: str | Sequence[str]) -> Self:
        """A smaller model of the same class with only what `tasks` need; its outputs for them are this model's.

        The new model is on the same device in the same dtype, in evaluation mode, and shares no memory with this one:
        it saves, loads and fine-tunes like any other.

        Raises:
            UnknownTaskError: a task that the model does not have.
        """
        names = check_task_names(tasks, self.tasks)
        values = None if self.device.type == "meta" else self.state_dict().__getitem__
        return self.reduced(self.config.for_tasks(names, values))

    def reduced(self, config: MultiTaskConfig) -> Self:
        """A smaller model, as `extract_task` makes it, of those tensors and rows of this one that `config` tells of."""
        refuse_offloaded(self, "extract_task")
        with torch.device("meta"):
            small = type(self)(config)
        dtype = next(self.parameters()).dtype
        if self.device.type == "meta":  # nothing to copy
            return small.to(dtype).eval()  # type: ignore[arg-type]  # as below
        state = self.state_dict()
        kept = {name: _rows(state[name], self.rows_kept(config, name)).detach().clone() for name in small.state_dict()}
        small = type(self).from_pretrained(None, config=config, state_dict=kept, dtype=dtype)
        small.to(self.device)  # type: ignore[arg-type]  # the library wraps it in a way that loses its types
        return small

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by who uses them: one list per task for what it uses alone, and `shared`."""
        users: dict[str, list[str]] = {}
        for task in self.tasks:
            with torch.device("meta"):
                alone = type(self)(self.config.for_tasks([task]))
            for name, _ in alone.named_parameters():
                users.setdefault(name, []).append(task)
        owned: dict[str, list[nn.Parameter]] = {name: [] for name in [SHARED, *self.tasks]}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                owner = users[name][0] if len(users[name]) == 1 else SHARED
                owned[owner].append(parameter)
        return owned

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """For code outside of transformers, upstream takes a module whose parameters are all in its children for loaded
        and leaves them as they lie in memory. `_init_weights` only uses functions that spare what was loaded."""
        super()._initialize_weights(module)

    def set_training_step(self, step: int) -> None:
        """Tells schedules inside the model how many optimiser steps were done; the trainer calls it."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the library's takes everything as keywords of its own
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        tasks: str | Sequence[str] | None = None,
        offload_experts: bool = False,
        config: MultiTaskConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Loads a model from a folder, a zoo name or a Hub id.

        Only safetensors are read. The file headers are checked against the config before anything is allocated; a
        missing, superfluous, misshapen or non-finite tensor is an error, and so is a path that leaves the folder.

        Args:
            pretrained_model_name_or_path: folder, zoo name, or Hub id `owner/name`; None with `config` and
                `state_dict`.
            tasks: read and build only what these tasks need.
            offload_experts: leave the sparse experts on disk; at most two of them are in memory, on a GPU as on a CPU.
                A call holds one head at a time of a model with several, while its task is answered. For evaluation
                alone; the files must stay as they are. Of the other options only dtype may go with it.
            config: instead of the folder's.
            state_dict: instead of the folder's weights; held to the same checks. An empty one starts the model anew.
            ignore_mismatched_sizes: initialise anew what is missing or of another shape, as transformers does, and
                leave out what is superfluous. Values are still checked.
            kwargs: as in `PreTrainedModel.from_pretrained` (dtype, device_map, ...).

        Raises:
            ModelNotFoundError, UnsafeFileError, CheckpointError: what is wrong with the folder, before it is read.
            UnknownTaskError: a task that the model does not have.
            ValueError: a config that makes no sense, arguments that contradict each other.
        """
        for key in ("subfolder", "variant"):
            if kwargs.pop(key, None):
                raise ValueError(f"{key}: a model here is one folder; give its path")
        if offload_experts and (state_dict is not None or ignore_mismatched_sizes or model_args):
            raise ValueError("offload_experts: expected the weights of a folder as they are, found others to be loaded")
        if tasks is not None and (state_dict is not None or ignore_mismatched_sizes):
            other = "state_dict" if state_dict is not None else "ignore_mismatched_sizes"
            raise ValueError(f"tasks: cannot go with {other}; load the whole model, then use extract_task")
        if pretrained_model_name_or_path is None:
            if config is None or state_dict is None:
                raise ValueError("expected a folder, a zoo name or a Hub id, or else both config and state_dict")
            return cls._from_state(config, state_dict, ignore_mismatched_sizes, model_args, kwargs)
        origin = str(pretrained_model_name_or_path)
        folder = hub.resolve(
            origin,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        if config is None:
            declared = hub.read_config(folder)["model_type"]
            if declared != cls.config_class.model_type:
                raise ValueError(
                    f"{folder} holds a model of type {declared!r}, {cls.__name__} loads "
                    f"{cls.config_class.model_type!r}; AutoModelForMultiTask loads either"
                )
            config = cls.config_class.from_pretrained(folder)
        if state_dict is not None:
            return cls._from_state(config, state_dict, ignore_mismatched_sizes, model_args, kwargs, origin)
        checkpoint = Checkpoint(folder, hash_weights=tasks is None)
        if ignore_mismatched_sizes:
            state = {name: checkpoint.read(name) for name in checkpoint.shapes}
            return cls._from_state(config, state, True, model_args, kwargs, origin)
        full = cls._on_meta(config)
        names = full.state_dict()
        checkpoint.check({name: tuple(tensor.shape) for name, tensor in names.items()})
        if tasks is not None:
            config = config.for_tasks(check_task_names(tasks, config.task_names), checkpoint.read)
            names = cls._on_meta(config).state_dict()
        if offload_experts:
            return _from(origin, load_offloaded(full, config, checkpoint, kwargs))
        state = {name: checkpoint.read(name, full.rows_kept(config, name)) for name in names}
        with no_progress_bar():
            model = super().from_pretrained(None, *model_args, config=config, state_dict=state, **kwargs)
        return _from(origin, model)

    @classmethod
    def _from_state(
        cls,
        config: MultiTaskConfig,
        state_dict: Mapping[str, Tensor],
        ignore_mismatched_sizes: bool,
        model_args: tuple[Any, ...],
        kwargs: dict[str, Any],
        origin: str = "",
    ) -> Self:
        """A model from tensors in memory, checked like those of a file."""
        expected = {name: tuple(tensor.shape) for name, tensor in cls._on_meta(config).state_dict().items()}
        if state_dict and not ignore_mismatched_sizes:
            check_shapes(expected, {name: tuple(t.shape) for name, t in state_dict.items()}, "the state_dict given")
        for name, tensor in state_dict.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckpointError(f"expected finite weights, found NaN or infinite values in {name}")
        with no_progress_bar():
            model = super().from_pretrained(
                None,
                *model_args,
                config=config,
                state_dict=dict(state_dict),
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                **kwargs,
            )
        return _from(origin, model)

    def save_pretrained(self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:  # type: ignore[override]
        """Saves config and weights into a folder; arguments as of `PreTrainedModel.save_pretrained`.

        The files appear by rename once all are written. Weights that stood there go, in one file or in shards; a
        manifest is written anew; every other file stays.

        Raises:
            FileExistsError: the path is a file.
            OSError: the disk is full; what stood in the folder is as it was.
        """
        refuse_offloaded(self, "save_pretrained")
        folder = Path(save_directory)
        repo_id = kwargs.pop("repo_id", folder.name)
        with replaced_files(folder, hub.WEIGHT_FILES) as staging, no_progress_bar():
            super().save_pretrained(staging, *args, **kwargs)
        if (folder / hub.MANIFEST).exists():
            hub.write_manifest(folder)
        if push_to_hub:
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    def push_to_hub(  # type: ignore[override]  # the library's takes what concerns its generic card
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> str:
        """Uploads the model with what makes it usable: its processor, and its card where the card is still true.

        The folder that the model was loaded from is looked at. Its processor and recipe go along; its card
        (`README.md`) and results only if the weights are still those of the folder. Otherwise the card says no more
        than what the model is and how it is loaded.

        Returns:
            the address of the commit.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            add_companions(folder, self.config.name_or_path or "", self._card(repo_id))
            hub.write_manifest(folder)
            return upload(
                folder,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _card(self, repo_id: str) -> str:
        tasks = "\n".join(f"- `{task.name}`: {task.kind}" for task in self.config.parsed_tasks)
        return (
            f"---\nlibrary_name: moe_mtl\ntags: [multi-task-learning, {self.config.model_type}]\n---\n"
            f"# {repo_id.rpartition('/')[2]}\n\n{type(self).__name__}, {self.num_parameters():,} parameters. Tasks:\n\n"
            f"{tasks}\n\n```python\nfrom moe_mtl import AutoModelForMultiTask\n\n"
            f'model = AutoModelForMultiTask.from_pretrained("{repo_id}")\n```\n'
        )

    @classmethod
    def _on_meta(cls, config: MultiTaskConfig) -> Self:
        with torch.device("meta"):
            model = cls(config)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"config declares {size:,} parameters; at most {MAX_PARAMETERS:,} are loaded")
        return model

    @classmethod
    def count_parameters(cls, config: MultiTaskConfig) -> int:
        """Parameters of the model of `config`, without building it in memory."""
        return sum(parameter.numel() for parameter in cls._on_meta(config).parameters())

    def fold_for_inference(self) -> Self:
        """Makes the model answer sooner, in place, with the same outputs to rounding; returns the model.

        What is constant after training (batch norms) is absorbed into the weights; a subclass says what else it does.
        """
        return self


def _from(origin: str, model: Any) -> Any:
    """Notes where a model came from, as transformers does: what it loads by name it calls by that name.

    `model` is a pair with a report where `output_loading_info` asked for it.
    """
    loaded = model[0] if isinstance(model, tuple) else model
    loaded.config._name_or_path = loaded.name_or_path = origin
    return model


def _rows(tensor: Tensor, rows: list[int] | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def register(model: type[MultiTaskModel]) -> type[MultiTaskModel]:
    """Class decorator at the end of every paper's file: makes the model known by its config's `model_type`."""
    config = model.config_class
    REGISTRY[config.model_type] = model
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoProcessor.register(config, model.processor_class)
    return model
