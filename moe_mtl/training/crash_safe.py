"""What all trainers share: a watched loss, fused optimisers, the one-cycle rate, checkpoints that survive a crash."""

import gc
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .checkpoints import (
    PREFIX,
    find_last_complete_checkpoint,
    keep_last_checkpoints,
    remove_stale_staging,
    verify_checkpoint,
    writing_checkpoint,
)
from .recipe import RecipeError
from .schedule import OneCycle, SavesAfterEvaluation, SparingSaves
from .stopping import BestWeights
from .watch import LossWatch

BEST = "best.safetensors"


class CrashSafeTrainer(Trainer):
    """`transformers.Trainer` with what this library promises of a run.

    The optimiser is fused AdamW or Adam; a loss that is not finite stops the run and names the task; checkpoints appear
    by rename and carry hashes, and resuming from an incomplete one is refused.

    Args:
        model: the model.
        args: as for `Trainer`; `logging_nan_inf_filter` is turned off.
        tasks: names, whose losses are watched.
        callbacks: further ones.
        one_cycle: use the one-cycle schedule instead of `args.lr_scheduler_type`; `args.warmup_steps` is its rise, a
            share of 30 % where that is 0.
        optimizer_name: `adamw`, `adam` (L2 regularisation instead of decoupled weight decay), or `sgd`, whose
            momentum is `args.adam_beta1`.
        seconds_between_saves: a checkpoint that falls due at the end of an epoch is left out if the last one is
            younger; what is saved stays exact, and small models do not spend their time on the disk.
        saved_along: text files, by name, that each checkpoint holds too.
        options: further ones of `Trainer`.
    """

    # Narrower than the library has them.
    model: Any
    args: TrainingArguments
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        tasks: Sequence[str],
        callbacks: Sequence[TrainerCallback] = (),
        *,
        one_cycle: bool = False,
        optimizer_name: str = "adamw",
        seconds_between_saves: float = 0.0,
        saved_along: Mapping[str, str] | None = None,
        **options: Any,
    ):
        args.logging_nan_inf_filter = False
        args.label_names = ["labels"]
        args.remove_unused_columns = False
        super().__init__(model=model, args=args, callbacks=list(callbacks), **options)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
        self.one_cycle, self.optimizer_name = one_cycle, optimizer_name
        self.saved_along = dict(saved_along or {})
        self.best: BestWeights | None = None
        self.add_callback(SavesAfterEvaluation())
        if seconds_between_saves > 0:
            self.add_callback(SparingSaves(seconds_between_saves))
        self.watch = LossWatch(tasks)

    # --- what a trainer adds ---

    def further_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimiser beside those of the model."""
        return []

    def save_weights(self, folder: Path) -> None:
        """Weights and config."""
        self.model.save_pretrained(folder)

    def save_further(self, folder: Path) -> None:
        """Files of a checkpoint beside model, optimiser, schedule and random states: the best weights so far."""
        if self.best is not None and self.best.weights is not None:
            save_file(self.best.weights, folder / BEST)

    def stop_early(self, best: BestWeights) -> None:
        """Watches a metric of the validation rows.

        Raises:
            RecipeError: there are none, or several tables of them.
        """
        rows: Any = self.eval_dataset
        if rows is None:
            raise RecipeError("train.early_stopping needs validation rows, found none")
        if isinstance(rows, dict):
            raise RecipeError(f"train.early_stopping watches one validation table, found several: {', '.join(rows)}")
        self.best = best
        self.add_callback(best)

    # --- one step ---

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
        """Fused AdamW, Adam or SGD; no decay of biases, norms and what `further_groups` adds."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            groups = [
                {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
            ]
            groups = [group for group in (*groups, *self.further_groups()) if group["params"]]
            if not groups:
                raise RecipeError("model.freeze leaves no parameter to train")
            rate, betas = self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2)
            if self.optimizer_name == "sgd":
                self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=betas[0], fused=True)
            else:
                kind = torch.optim.Adam if self.optimizer_name == "adam" else torch.optim.AdamW
                self.optimizer = kind(groups, lr=rate, betas=betas, eps=self.args.adam_epsilon, fused=True)
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
            self.save_weights(staging)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(staging)
            torch.save(self.optimizer.state_dict(), staging / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), staging / "scheduler.pt")
            self._save_scaler(str(staging))
            for process, state in enumerate(generators):
                name = "rng_state.pth" if len(generators) == 1 else f"rng_state_{process}.pth"
                torch.save(state, staging / name)
            self.save_further(staging)
            self.state.save_to_json(str(staging / "trainer_state.json"))
            for name, text in self.saved_along.items():
                (staging / name).write_text(text, encoding="utf-8")
        if self.args.save_total_limit:
            keep_last_checkpoints(folder, self.args.save_total_limit)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.best is not None and Path(checkpoint, BEST).is_file():
            self.best.weights = load_file(Path(checkpoint, BEST))


def _generator_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state
