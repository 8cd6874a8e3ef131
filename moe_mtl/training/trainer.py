"""The one trainer: `transformers.Trainer` with batches by index, watched losses and checkpoints that survive a crash.

Shapes: `N` rows of a split.
"""

import gc
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PredictionOutput

from ..data.processor import TabularProcessor
from ..data.tensors import ShuffledBatches, TensorTable
from ..models import MultiTaskModel
from .balancing import GradientBalancer, LossBalancer, balancer_state, load_balancer_state
from .checkpoints import (
    PREFIX,
    find_last_complete_checkpoint,
    keep_last_checkpoints,
    remove_stale_staging,
    verify_checkpoint,
    writing_checkpoint,
)
from .evaluation import Evaluation, evaluate_table
from .metrics import counted_rows
from .recipe import EarlyStopping, RecipeError, TaskSampling
from .sampling import BatchLoader, TaskBatches, TaskRows
from .schedule import BalancerSteps, OneCycle, SavesAfterEvaluation, SparingSaves
from .stopping import BestWeights
from .watch import LossWatch

BALANCING = "balancing.pt"
BEST = "best.safetensors"


class MultiTaskTrainer(Trainer):
    """Trains any model of the zoo on encoded rows.

    What `transformers.Trainer` does through its arguments stays. What differs: batches come from a `TensorTable` by
    index, in an order given by the seed and the epoch; the optimiser is fused AdamW or Adam; `evaluate` computes every
    metric once over the whole split; a loss that is not finite stops the run and names the task; checkpoints appear by
    rename and carry hashes, and resuming from an incomplete one is refused.

    Under gradient accumulation the loss is the mean over the batches of a step, each the mean over its own counted
    rows.

    Args:
        model: the model.
        args: as for `Trainer`; `logging_nan_inf_filter` is turned off.
        train_dataset: encoded rows with `labels`.
        eval_dataset: encoded rows with `labels`, or several by name.
        processing_class: the processor; saved with each checkpoint, and used for regression metrics in original units.
        callbacks: further ones.
        loss_balancing, gradient_balancing: name and options of a method of TorchJD; at most one of the two.
        task_sampling: draw batches of one task each.
        early_stopping: when to stop; the best weights are restored at the end in any case.
        one_cycle: use the one-cycle schedule instead of `args.lr_scheduler_type`; `args.warmup_steps` is its rise, a
            share of 30 % where that is 0.
        adam: L2 regularisation instead of decoupled weight decay.
        seconds_between_saves: a checkpoint that falls due at the end of an epoch is left out if the last one is
            younger; what is saved stays exact, and small models do not spend their time on the disk.
        saved_along: text files, by name, that each checkpoint holds too.

    Raises:
        RecipeError: settings that cannot go together.
    """

    # Narrower than the library has them.
    model: MultiTaskModel
    args: TrainingArguments
    train_dataset: TensorTable | None
    eval_dataset: TensorTable | dict[str, TensorTable] | None
    processing_class: TabularProcessor | None  # type: ignore[assignment]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self,
        model: MultiTaskModel,
        args: TrainingArguments,
        train_dataset: TensorTable | None = None,
        eval_dataset: TensorTable | dict[str, TensorTable] | None = None,
        processing_class: TabularProcessor | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        loss_balancing: tuple[str, Mapping[str, Any]] | None = None,
        gradient_balancing: tuple[str, Mapping[str, Any]] | None = None,
        task_sampling: TaskSampling | None = None,
        early_stopping: EarlyStopping | None = None,
        one_cycle: bool = False,
        adam: bool = False,
        seconds_between_saves: float = 0.0,
        saved_along: Mapping[str, str] | None = None,
    ):
        args.logging_nan_inf_filter = False
        args.label_names = ["labels"]
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )
        vars(model.config).pop("use_cache", None)  # the library writes it into every config; ours have no such field
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
        self.tasks = model.config.parsed_tasks
        self.task_sampling, self.one_cycle, self.adam = task_sampling, one_cycle, adam
        self.saved_along = dict(saved_along or {})
        self._weights = {task.name: task.weight for task in self.tasks}
        self._check(loss_balancing, gradient_balancing)
        balanced = [task.name for task in self.tasks if task.weight > 0]
        self.loss_balancer = None if loss_balancing is None else LossBalancer(*loss_balancing, balanced).to(args.device)
        self.gradient_balancer = None
        if gradient_balancing is not None:
            self.gradient_balancer = GradientBalancer(*gradient_balancing, balanced, model.task_parameters())
        self.best = None
        if early_stopping is not None:
            if eval_dataset is None:
                raise RecipeError("train.early_stopping needs validation rows, found none")
            if isinstance(eval_dataset, dict):
                raise RecipeError(
                    f"train.early_stopping watches one validation table, found several: {', '.join(eval_dataset)}"
                )
            self.best = BestWeights(early_stopping, self.tasks)
            self.add_callback(self.best)
        if self.loss_balancer is not None:
            self.add_callback(BalancerSteps(self.loss_balancer))
        self.add_callback(SavesAfterEvaluation())
        if seconds_between_saves > 0:
            self.add_callback(SparingSaves(seconds_between_saves))
        # A frozen batch norm must not go on averaging what passes through it.
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
        self._frozen_norms = [norm for norm in norms if not norm.weight.requires_grad and not norm.bias.requires_grad]
        self.watch = LossWatch([task.name for task in self.tasks])

    def _check(self, loss_balancing: Any, gradient_balancing: Any) -> None:
        args, accelerator = self.args, self.accelerator
        if loss_balancing is not None and gradient_balancing is not None:
            raise RecipeError("loss balancing and gradient balancing would weigh the tasks twice; choose one of them")
        chosen = [("loss_balancing", loss_balancing), ("gradient_balancing", gradient_balancing)]
        for key, method in chosen:
            if method is None:
                continue
            if self.task_sampling is not None:
                raise RecipeError(
                    f"train.{key}: {method[0]} has nothing to balance in batches of one task (train.task_sampling)"
                )
            if accelerator.num_processes > 1:
                raise RecipeError(
                    f"train.{key}: {method[0]} keeps its state in one process, found {accelerator.num_processes}"
                )
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise RecipeError(f"train.{key}: {method[0]} cannot be used with DeepSpeed, which owns the gradients")
        if gradient_balancing is not None:
            where = f"train.gradient_balancing: {gradient_balancing[0]}"
            if args.fp16:
                raise RecipeError(
                    f"{where} differentiates each loss itself, past the gradient scaler that fp16 needs; use bf16"
                )
            checkpointing = dict(args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
            if args.activation_checkpointing and "use_reentrant" in checkpointing and checkpointing["use_reentrant"]:
                raise RecipeError(
                    f"{where} cannot differentiate through re-entrant checkpointing; set use_reentrant to false"
                )
            if args.torch_compile:
                raise RecipeError(f"{where} cannot differentiate a compiled model loss by loss; turn torch_compile off")

    # --- batches ---

    def get_train_dataloader(self) -> BatchLoader:
        """Whole batches by index; see `moe_mtl.training.sampling`."""
        if self.train_dataset is None or not self.train_dataset.tensors.get("labels"):
            raise ValueError("training needs encoded rows with labels, found none")
        table, size, seed = self.train_dataset, self._train_batch_size, self.args.data_seed
        seed = self.args.seed if seed is None else seed
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        place = (self.args.process_index, self.args.world_size)
        if self.task_sampling is None:
            return BatchLoader(table, ShuffledBatches(len(table), size, seed), pin, *place)
        labelled = [task for task in self.tasks if task.name in table.tensors["labels"]]
        batches = TaskBatches(labelled, table.tensors["labels"], size, self.task_sampling.temperature, seed)
        return BatchLoader(TaskRows(table, labelled), batches, pin, *place)

    # --- one step ---

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch. Returns the loss as its share of the step."""
        if not model.training or any(norm.training for norm in self._frozen_norms):
            model.train()
            for norm in self._frozen_norms:
                norm.eval()
        self.model.set_training_step(self.state.global_step)
        if self.args.device.type != "cpu":
            inputs = self._prepare_inputs(inputs)
        inputs.pop("groups", None)
        with self.compute_loss_context_manager():
            output = model(**inputs)
        self.watch.add(output.task_losses)
        if self.args.device.type == "cpu":  # elsewhere reading a value stalls the device: see _maybe_log_save_evaluate
            self.watch.require_finite(self.state.global_step, self.state.epoch)
        share = 1 / self.current_gradient_accumulation_steps
        if self._balancer is None:
            return self._backward(output.loss * share)
        labels = inputs["labels"]
        present = [t.name for t in self.tasks if t.name in labels and bool(counted_rows(t, labels).any())]
        losses = {name: loss * (self._weights[name] * share) for name, loss in output.task_losses.items()}
        auxiliary = None if output.auxiliary_loss is None else output.auxiliary_loss * share
        if self.loss_balancer is not None:
            # The method sees losses of whole batches: it may not be linear in them.
            whole = {name: loss * self._weights[name] for name, loss in output.task_losses.items()}
            loss = self.loss_balancer(whole, present) * share
            return self._backward(loss if auxiliary is None else loss + auxiliary)
        assert self.gradient_balancer is not None
        self.gradient_balancer.backward(losses, present, auxiliary)
        return output.loss.detach() * share

    def _backward(self, loss: Tensor) -> Tensor:
        if self._is_plain:
            loss.backward()
        else:
            self.accelerator.backward(loss)
        return loss.detach()

    @property
    def _is_plain(self) -> bool:
        """Whether gradients are neither scaled nor owned by another library."""
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.accelerator.distributed_type in kinds and self.accelerator.scaler is None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Only where it is needed to clip: its value costs a pass over all parameters."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated here: the library's guess counts tokens. See `moe_mtl.pathway.cost`."""
        return 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.watch.require_finite(self.state.global_step, self.state.epoch)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean loss of each task since the last entry."""
        if "loss" in logs:
            logs |= {f"loss/{task}": value for task, value in self.watch.means().items()}
            self.watch.reset()
        super().log(logs, start_time)

    # --- optimiser ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Fused AdamW or Adam; no decay of biases, norms and the balancing method's own parameters."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            groups = [
                {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
            ]
            if self.loss_balancer is not None:
                groups.append({"params": list(self.loss_balancer.parameters()), "weight_decay": 0.0})
            groups = [group for group in groups if group["params"]]
            if not groups:
                raise RecipeError("model.freeze leaves no parameter to train")
            kind = torch.optim.Adam if self.adam else torch.optim.AdamW
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = kind(
                groups, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon, fused=True
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the arguments, or one-cycle."""
        if self._is_plain and isinstance(self.optimizer, AcceleratedOptimizer):
            # The wrapper serves gradient scalers and XLA. Here it would only look on the disk, every step, for a
            # package that is not there.
            self.optimizer = self.optimizer.optimizer
        if not self.one_cycle or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        rise = self.args.get_warmup_steps(num_training_steps) or math.ceil(0.3 * num_training_steps)
        factor = OneCycle(rise, num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer, factor
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- evaluation ---

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: TensorTable | dict[str, TensorTable] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics over whole splits: `eval_loss`, `eval_mean_auc`, `eval_<task>/<metric>`.

        Every process evaluates all rows: the numbers do not depend on how many there are.
        """
        table = self.eval_dataset if eval_dataset is None else eval_dataset
        if table is None:
            raise ValueError("evaluation needs encoded rows, found none")
        if isinstance(table, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in table.items()]
            return {key: value for part in parts for key, value in part.items()}
        start = time.perf_counter()
        result = self._evaluation(table)
        seconds = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.flat().items()}
        metrics |= {
            f"{metric_key_prefix}_runtime": seconds,
            f"{metric_key_prefix}_samples_per_second": len(table) / seconds,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(  # type: ignore[override]
        self, test_dataset: TensorTable, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits by task, labels by task and metrics."""
        result = self._evaluation(test_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.flat().items()}
        labels: Any = {name: values.numpy() for name, values in test_dataset.tensors["labels"].items()}
        logits: Any = {name: values.numpy() for name, values in result.logits.items()}
        return PredictionOutput(logits, labels, metrics)

    def _evaluation(self, table: TensorTable) -> Evaluation:
        unscale = None if self.processing_class is None else self.processing_class.unscale
        return evaluate_table(self.model, table, self.args.per_device_eval_batch_size, self.tasks, unscale)

    # --- checkpoints ---

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains. `resume_from_checkpoint=True` takes the last complete checkpoint of the output folder.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
            ValueError: there is none.
            TrainingDivergedError: a loss is not finite.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint: Path | None = None
        if resume_from_checkpoint is True:
            checkpoint = find_last_complete_checkpoint(folder)
            if checkpoint is None:
                raise ValueError(f"expected a complete checkpoint in {folder}, found none")
        elif resume_from_checkpoint:
            checkpoint = verify_checkpoint(Path(resume_from_checkpoint))
        if self.accelerator.is_main_process:
            remove_stale_staging(folder)
        gc.freeze()  # accelerate begins with a full collection, which would walk all that the imports have made
        try:
            return super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
        finally:
            gc.unfreeze()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything a resumed run needs, by rename; older checkpoints go only afterwards."""
        generators = gather_object([_generator_state()]) if self.args.world_size > 1 else [_generator_state()]
        if not self.args.should_save:
            return
        self.store_flos()
        folder = Path(str(self.args.output_dir))
        with writing_checkpoint(folder / f"{PREFIX}{self.state.global_step}") as staging:
            self.model.save_pretrained(staging)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(staging)
            torch.save(self.optimizer.state_dict(), staging / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), staging / "scheduler.pt")
            self._save_scaler(str(staging))
            for process, state in enumerate(generators):
                name = "rng_state.pth" if len(generators) == 1 else f"rng_state_{process}.pth"
                torch.save(state, staging / name)
            if self._balancer is not None and (state := balancer_state(self._balancer)) is not None:
                torch.save(state, staging / BALANCING)
            if self.best is not None and self.best.weights is not None:
                save_file(self.best.weights, staging / BEST)
            self.state.save_to_json(str(staging / "trainer_state.json"))
            for name, text in self.saved_along.items():
                (staging / name).write_text(text, encoding="utf-8")
        if self.args.save_total_limit:
            keep_last_checkpoints(folder, self.args.save_total_limit)

    @property
    def _balancer(self) -> LossBalancer | GradientBalancer | None:
        return self.loss_balancer if self.loss_balancer is not None else self.gradient_balancer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._balancer is not None:
            path = Path(checkpoint, BALANCING)
            if not path.is_file():
                raise RecipeError(
                    f"{checkpoint} cannot be resumed from: it does not hold the state of {self._balancer.name}"
                )
            load_balancer_state(self._balancer, torch.load(path, weights_only=True))
        if self.best is not None and Path(checkpoint, BEST).is_file():
            self.best.weights = load_file(Path(checkpoint, BEST))


def _generator_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state
