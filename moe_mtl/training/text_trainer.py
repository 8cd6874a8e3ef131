"""Training and measuring language models on examples of several tasks.

Shapes: `B` samples of a batch, `L` tokens of the longest, `N` examples of a split.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from ..data.tensors import ShuffledBatches
from ..data.text import IGNORED, TokenTable, collate
from ..tuners import BalanceRanks, RankTuner
from .crash_safe import CrashSafeTrainer
from .metrics import Metrics, mean_metrics
from .recipe import EarlyStopping, RecipeError
from .sampling import BatchLoader
from .stopping import BestWeights

REPORTED = ("exact_match", "log_loss")


@dataclass
class TextEvaluation:
    """What a language model does on a split.

    Attributes:
        metrics: task -> metric -> value. `exact_match`: the share of examples whose answer greedy decoding gets right
            to the last token, which it does exactly if every token of the answer is the likeliest after those before
            it. `log_loss`: nats per token of the answers.
        loss: nats per token over all examples.
        exact: bool `[N]`, per example.
    """

    metrics: Metrics
    loss: float
    exact: Tensor = field(repr=False)

    def flat(self) -> dict[str, float]:
        """`reverse/exact_match`, `mean_exact_match`, `loss`: the names that early stopping and the log use."""
        out = {"loss": self.loss}
        out |= {f"{task}/{metric}": value for task, values in self.metrics.items() for metric, value in values.items()}
        return out | mean_metrics(self.metrics)


def task_keyword(model: nn.Module) -> str | None:
    """The keyword under which a model wants the tasks of its samples; None if it knows no tasks."""
    if not isinstance(model, PeftModel):
        return None
    if isinstance(model.base_model, RankTuner):
        return "preference" if model.active_peft_config.adapter_class.by_preference else "tasks"
    return "task_ids" if model.active_peft_config.peft_type == "POLY" else None


@torch.no_grad()
def evaluate_text(model: nn.Module, table: TokenTable, batch_size: int, pad: int) -> TextEvaluation:
    """Metrics of a language model on encoded examples; the model's mode is put back.

    Args:
        model: of transformers, or with adapters, whose tasks are numbered as the table's.
        table: the examples.
        batch_size: examples per forward pass.
        pad: the token that fills short rows.

    Raises:
        ValueError: no examples.
    """
    if not len(table):
        raise ValueError("expected at least one example to measure, found none")
    was_training, keyword = model.training, task_keyword(model)
    device = next(model.parameters()).device
    exact_N, nats_N = torch.zeros(len(table), dtype=torch.bool), torch.zeros(len(table), dtype=torch.float64)
    tokens_N = torch.zeros(len(table), dtype=torch.float64)
    model.eval()
    try:
        for batch in table.batches(batch_size, pad):
            rows_B, labels_BL = batch.pop("rows"), batch.pop("labels")[:, 1:].to(device)
            inputs = named(batch, keyword, len(table.tasks))
            logits_BLC = model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False).logits
            logits_BLC = logits_BLC[:, :-1]
            asked_BL = labels_BL != IGNORED
            right_BL = logits_BLC.argmax(-1) == labels_BL
            nats_BL = torch.zeros_like(labels_BL, dtype=torch.float32)
            nats_BL[asked_BL] = F.cross_entropy(logits_BLC[asked_BL].float(), labels_BL[asked_BL], reduction="none")
            exact_N[rows_B] = (right_BL | ~asked_BL).all(1).cpu()
            nats_N[rows_B] = nats_BL.double().sum(1).cpu()
            tokens_N[rows_B] = asked_BL.double().sum(1).cpu()
    finally:
        model.train(was_training)
    metrics = {}
    for number, task in enumerate(table.tasks):
        of_task = table.task == number
        if bool(of_task.any()):
            metrics[task] = {
                "exact_match": float(exact_N[of_task].double().mean()),
                "log_loss": float(nats_N[of_task].sum() / tokens_N[of_task].sum()),
            }
    return TextEvaluation(metrics, float(nats_N.sum() / tokens_N.sum()), exact_N)


class TextTrainer(CrashSafeTrainer):
    """Trains a language model, or an adapter on one, on examples of several tasks in mixed batches.

    The loss is the mean over the tokens of the answers, of all batches of a step together.

    Args:
        model: of transformers, or with adapters, whose tasks are numbered as the tables'.
        args: as for `Trainer`.
        train: encoded examples.
        validation: likewise.
        tokenizer: saved with each checkpoint.
        callbacks: further ones.
        packed: rows of several examples of `train`, of `pack`.
        early_stopping: when to stop; the best weights are restored at the end in any case.
        options: further ones of `CrashSafeTrainer`.

    Raises:
        RecipeError: settings that cannot go together.
    """

    model: nn.Module

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train: TokenTable,
        validation: TokenTable,
        tokenizer: Any,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        packed: Sequence[Mapping[str, Any]] | None = None,
        early_stopping: EarlyStopping | None = None,
        **options: Any,
    ):
        self.keyword, self.pad, self.num_tasks = task_keyword(model), pad_token(tokenizer), len(train.tasks)
        if packed is not None and self.keyword == "task_ids":
            raise RecipeError("train.packing: expected a method that takes a task per token, found poly")
        rows: Any = train if packed is None else packed
        super().__init__(
            model,
            args,
            ["all of them"],
            callbacks,
            train_dataset=_Rows(rows, self.pad, self.keyword),
            eval_dataset=validation,
            processing_class=tokenizer,
            **options,
        )
        self.adds_losses = None
        if isinstance(model, PeftModel) and isinstance(model.base_model, RankTuner):
            self.adds_losses = model.base_model.current_tasks.losses
            self.add_callback(BalanceRanks())
        if early_stopping is not None:
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            if isinstance(model, PeftModel):
                trained |= {name for name, _ in model.named_buffers() if f".{model.active_adapter}." in name}
            self.stop_early(BestWeights(early_stopping, dict.fromkeys(train.tasks, REPORTED), trained.__contains__))

    def save_weights(self, folder: Path) -> None:
        """Of an adapter, its own."""
        save_model(self.model, folder)

    def get_train_dataloader(self) -> BatchLoader:
        """Whole batches by index, in an order given by the seed and the epoch."""
        rows: Any = self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        batches = ShuffledBatches(len(rows), self._train_batch_size, seed)
        return BatchLoader(rows, batches, pin, self.args.process_index, self.args.world_size)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own, watched; of a model that mixes tasks weighed by a preference that is drawn."""
        inputs = {**inputs, "use_cache": False}
        found: Any
        num_items = kwargs.get("num_items_in_batch")
        # The trainer sums over the batches of a step and over processes what it divided by all their tokens.
        several = self.current_gradient_accumulation_steps * self.args.world_size
        if self.adds_losses is not None:
            self.adds_losses.factor = 1.0 if num_items is None else 1 / several
        if self.keyword == "preference" and model.training:
            found = self._weighed(model, inputs, num_items)
            if num_items is not None and self.args.average_tokens_across_devices:
                found = found * self.accelerator.num_processes
        else:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            self.watch.add({"all of them": loss})
            if self.args.device.type == "cpu":  # elsewhere reading a value stalls the device
                self.watch.require_finite(self.state.global_step, self.state.epoch)
        return found

    def _weighed(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """One preference for the batch, near the corners of the simplex, where single tasks are, and between them.

        A token's loss is weighed by its task's preference, so that a task counts by its tokens, as in the plain loss.
        """
        tasks, labels_BL = inputs.pop("tasks"), inputs.pop("labels")
        weights_T = torch.distributions.Dirichlet(torch.full((self.num_tasks,), 1 / self.num_tasks)).sample()
        weights_T = weights_T.to(labels_BL.device)
        logits_BLC = model(**inputs, preference=weights_T).logits[:, :-1].float()
        labels_BL = labels_BL[:, 1:]
        nats_BL = F.cross_entropy(logits_BLC.transpose(1, 2), labels_BL, ignore_index=IGNORED, reduction="none")
        weights = weights_T[tasks[:, 1:] if tasks.dim() == 2 else tasks[:, None]] * self.num_tasks
        return (nats_BL * weights).sum() / ((labels_BL != IGNORED).sum() if num_items is None else num_items)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: TokenTable | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics over whole splits: `eval_loss`, `eval_mean_exact_match`, `eval_<task>/<metric>`."""
        table: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.perf_counter()
        result = evaluate_text(self.model, table, self.args.per_device_eval_batch_size, self.pad)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.flat().items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without the watched loss, which is the loss itself."""
        super().log(logs, start_time)
        for entry in (logs, self.state.log_history[-1]):
            entry.pop("loss/all of them", None)


def save_model(model: Any, folder: Path) -> None:
    """Weights and config of a language model, or of an adapter."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    # Without a search on the Hub for whether the base model's vocabulary grew: here it never does.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


def pack(table: TokenTable, length: int) -> list[dict[str, Any]]:
    """Examples put together into rows of at most `length` tokens, best fit first, by TRL.

    Raises:
        ModuleNotFoundError: TRL is not installed.
    """
    from datasets import Dataset as Columns
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from trl.data_utils import pack_dataset

    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return pack_dataset(Columns.from_list([table[i] for i in range(len(table))]), length, strategy="bfd").to_list()
    finally:
        if bars:
            enable_progress_bar()


@torch.no_grad()
def keeps_packed_apart(model: Any, table: TokenTable) -> bool:
    """Whether a model answers two examples in one row as it answers each by itself: not all tell them by positions."""
    samples = [table[i] for i in range(min(2, len(table)))]
    packed = {key: [token for one in samples for token in one[key]] for key in samples[0]}
    lengths = [len(one["input_ids"]) for one in samples]
    keyword, device, was_training = task_keyword(model), next(model.parameters()).device, model.training

    def logits(sample: dict[str, Any]) -> Tensor:
        batch = named(collate([sample], 0), keyword, len(table.tasks))
        if keyword == "preference":
            batch["preference"] = torch.full((len(table.tasks),), 1 / len(table.tasks))
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        return model(**inputs, use_cache=False).logits[0].float()

    model.eval()
    try:
        together = logits(packed | {"seq_lengths": lengths}).split(lengths)
        apart = [logits(one | {"seq_lengths": [n]}) for one, n in zip(samples, lengths, strict=True)]
    finally:
        model.train(was_training)
    slack = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    return all(torch.allclose(a, b, rtol=slack, atol=slack) for a, b in zip(together, apart, strict=True))


def pad_token(tokenizer: Any) -> int:
    """What fills short rows; it is masked, so that any token will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _Rows(Dataset):
    def __init__(self, rows: Any, pad: int, keyword: str | None):
        self.rows, self.pad, self.keyword = rows, pad, keyword

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, chosen: Tensor) -> dict[str, Tensor]:
        batch = collate([self.rows[int(i)] for i in chosen], self.pad)
        return batch if self.keyword == "preference" else named(batch, self.keyword, 0)


def named(batch: dict[str, Tensor], keyword: str | None, num_tasks: int) -> dict[str, Tensor]:
    """Tasks under the keyword; to a model that mixes tasks, each sample prefers its own."""
    tasks = batch.pop("tasks")
    if keyword == "preference":
        return batch | {keyword: F.one_hot(tasks, num_tasks).float()}
    return batch if keyword is None else batch | {keyword: tasks}


def curve(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Validation over the steps, from a trainer's log: `step`, `mean_exact_match`, `loss`."""
    entries = [entry for entry in history if not math.isnan(entry.get("eval_mean_exact_match", math.nan))]
    out: dict[str, list[float]] = {"step": [entry["step"] for entry in entries]}
    return out | {key: [entry[f"eval_{key}"] for entry in entries] for key in ("mean_exact_match", "loss")}
