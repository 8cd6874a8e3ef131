"""The one trainer: `transformers.Trainer` with batches by index, watched losses and checkpoints that survive a crash.

Shapes: `N` rows of a split.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from ..data.images import ImageTable
from ..data.mixed import JoinedImages
from ..data.processor import TabularProcessor
from ..data.tensors import ShuffledBatches, TensorTable
from ..data.vision_processor import VisionProcessor
from ..models import MultiTaskModel
from .balancing import GradientBalancer, LossBalancer, balancer_state, load_balancer_state
from .crash_safe import CrashSafeTrainer
from .evaluation import Evaluation, evaluate
from .metrics import counted_rows
from .recipe import EarlyStopping, RecipeError, TaskSampling
from .sampling import BatchLoader, TaskBatches, TaskRows, rows_by_task
from .schedule import BalancerSteps
from .stopping import BestWeights

BALANCING = "balancing.pt"
Table = TensorTable | ImageTable


class MultiTaskTrainer(CrashSafeTrainer):
    """Trains any model of the zoo on encoded rows or on pictures.

    What `transformers.Trainer` does through its arguments stays. What differs: batches come from a table by index, in
    an order given by the seed and the epoch; the optimiser is a fused one; `evaluate` computes every metric
    once over the whole split; a loss that is not finite stops the run and names the task; checkpoints appear by rename
    and carry hashes, and resuming from an incomplete one is refused.

    Under gradient accumulation the loss is the mean over the batches of a step, each the mean over its own counted
    rows.

    Args:
        model: the model.
        args: as for `Trainer`; `logging_nan_inf_filter` is turned off.
        train_dataset: encoded rows with `labels`, or pictures.
        eval_dataset: the same, or several tables by name.
        processing_class: the processor; saved with each checkpoint, and used for regression metrics in original units.
        callbacks: further ones.
        loss_balancing, gradient_balancing: name and options of a method of TorchJD; at most one of the two.
        task_sampling: draw batches of one task each.
        early_stopping: when to stop; the best weights are restored at the end in any case.
        options: further ones of `CrashSafeTrainer`.

    Raises:
        RecipeError: settings that cannot go together.
    """

    # Narrower than the library has them.
    model: MultiTaskModel
    train_dataset: Table | None
    eval_dataset: Table | dict[str, Table] | None
    processing_class: TabularProcessor | VisionProcessor | None  # type: ignore[assignment]

    def __init__(
        self,
        model: MultiTaskModel,
        args: TrainingArguments,
        train_dataset: Table | None = None,
        eval_dataset: Table | dict[str, Table] | None = None,
        processing_class: TabularProcessor | VisionProcessor | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        loss_balancing: tuple[str, Mapping[str, Any]] | None = None,
        gradient_balancing: tuple[str, Mapping[str, Any]] | None = None,
        task_sampling: TaskSampling | None = None,
        early_stopping: EarlyStopping | None = None,
        **options: Any,
    ):
        self.tasks = model.config.parsed_tasks
        super().__init__(
            model,
            args,
            [task.name for task in self.tasks],
            callbacks,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        vars(model.config).pop("use_cache", None)  # the library writes it into every config; ours have no such field
        self.task_sampling = task_sampling
        self._weights = {task.name: task.weight for task in self.tasks}
        self._check(loss_balancing, gradient_balancing)
        balanced = [task.name for task in self.tasks if task.weight > 0]
        self.loss_balancer = None if loss_balancing is None else LossBalancer(*loss_balancing, balanced).to(args.device)
        self.gradient_balancer = None
        if gradient_balancing is not None:
            self.gradient_balancer = GradientBalancer(*gradient_balancing, balanced, model.task_parameters())
        if early_stopping is not None:
            reported = {task.name: task.reported_metrics for task in self.tasks}
            self.stop_early(BestWeights(early_stopping, reported))
        if self.loss_balancer is not None:
            self.add_callback(BalancerSteps(self.loss_balancer))
        # A frozen batch norm must not go on averaging what passes through it.
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
        self._frozen_norms = [norm for norm in norms if not norm.weight.requires_grad and not norm.bias.requires_grad]

    def _check(self, loss_balancing: Any, gradient_balancing: Any) -> None:
        args, accelerator = self.args, self.accelerator
        if loss_balancing is not None and gradient_balancing is not None:
            raise RecipeError("loss balancing and gradient balancing would weigh the tasks twice; choose one of them")
        chosen = [("loss_balancing", loss_balancing), ("gradient_balancing", gradient_balancing)]
        for key, method in chosen:
            if method is None:
                continue
            if self.task_sampling is not None and self.task_sampling.by == "task":
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
            # By the older names, which transformers 5.17 has alone and later ones keep in step.
            checkpointing = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
            if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
                raise RecipeError(
                    f"{where} cannot differentiate through re-entrant checkpointing; set use_reentrant to false"
                )
            if args.torch_compile:
                raise RecipeError(f"{where} cannot differentiate a compiled model loss by loss; turn torch_compile off")

    # --- batches ---

    def get_train_dataloader(self) -> BatchLoader:
        """Whole batches by index; see `moe_mtl.training.sampling`."""
        table = self.train_dataset
        if table is None or (isinstance(table, TensorTable) and not table.tensors.get("labels")):
            raise ValueError("training needs encoded rows with labels, found none")
        size, seed = self._train_batch_size, self.args.data_seed
        seed = self.args.seed if seed is None else seed
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        place = (self.args.process_index, self.args.world_size)
        if self.task_sampling is None:
            return BatchLoader(table, ShuffledBatches(len(table), size, seed), pin, *place)
        temperature = self.task_sampling.temperature
        if self.task_sampling.by == "data_set":
            if not isinstance(table, JoinedImages):
                raise RecipeError(
                    "train.task_sampling.by: data_set needs several of them (data.name: mixed), found one"
                )
            rows = {name: chosen_N for name, (chosen_N, _) in table.sources.items()}
            groups = {name: names for name, (_, names) in table.sources.items()}
            batches = TaskBatches(rows, size, temperature, seed)
            return BatchLoader(TaskRows(table, self.tasks, groups), batches, pin, *place)
        batches = TaskBatches(rows_by_task(table, self.tasks), size, temperature, seed)
        return BatchLoader(TaskRows(table, self.tasks), batches, pin, *place)

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

    # --- evaluation ---

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Table | dict[str, Table] | None = None,
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
        self, test_dataset: Table, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits by task, labels by task and metrics; of dense tasks metrics alone."""
        result = self._evaluation(test_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.flat().items()}
        labels: Any = {name: values.numpy() for name, values in result.labels.items()}
        logits: Any = {name: values.numpy() for name, values in result.logits.items()}
        return PredictionOutput(logits, labels, metrics)

    def _evaluation(self, table: Table) -> Evaluation:
        unscale = None if self.processing_class is None else self.processing_class.unscale
        return evaluate(self.model, table, self.args.per_device_eval_batch_size, self.tasks, unscale)

    # --- checkpoints ---

    def further_groups(self) -> list[dict[str, Any]]:
        """Of the balancing method, which is not decayed."""
        if self.loss_balancer is None:
            return []
        return [{"params": list(self.loss_balancer.parameters()), "weight_decay": 0.0}]

    def save_further(self, folder: Path) -> None:
        """The state of the balancing method too."""
        super().save_further(folder)
        if self._balancer is not None and (state := balancer_state(self._balancer)) is not None:
            torch.save(state, folder / BALANCING)

    @property
    def _balancer(self) -> LossBalancer | GradientBalancer | None:
        return self.loss_balancer if self.loss_balancer is not None else self.gradient_balancer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._balancer is not None:
            path = Path(checkpoint, BALANCING)
            if not path.is_file():
                raise RecipeError(
                    f"{checkpoint} cannot be resumed from: it does not hold the state of {self._balancer.name}"
                )
            load_balancer_state(self._balancer, torch.load(path, weights_only=True))
