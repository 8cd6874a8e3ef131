"""The trainer against loops written out by hand."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from moe_mtl.data.tensors import ShuffledBatches, TensorTable
from moe_mtl.training.recipe import EarlyStopping, RecipeError, TaskSampling
from moe_mtl.training.schedule import OneCycle
from moe_mtl.training.watch import TrainingDivergedError

NAN = float("nan")


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_equals_a_plain_loop_bit_for_bit(make_model, make_table, make_trainer):
    table = make_table(70)
    model, reference = make_model(dropout=0.2), make_model(dropout=0.2)
    trainer = make_trainer(model, table, epochs=2, logging_steps=1, schedule="one_cycle", seed=3)
    trainer.train()

    torch.manual_seed(3)
    reference.train()
    decayed = [p for n, p in reference.named_parameters() if "bias" not in n]
    plain = [p for n, p in reference.named_parameters() if "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, fused=True
    )
    batches, expected, step = ShuffledBatches(70, 16, seed=3), [], 0
    factor = OneCycle(math.ceil(0.3 * 10), 10)
    for epoch in range(2):
        batches.set_epoch(epoch)
        for index in batches:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * factor(step)
            loss = reference(**table[index]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
            step += 1
    assert step == 10
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-6)
    for (name, left), right in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing():
    factor = OneCycle(3, 10)
    values = [factor(step) for step in range(10)]
    assert values[0] == pytest.approx(1 / 25)
    assert max(values) == values[3] == 1.0
    assert values[3:] == sorted(values[3:], reverse=True)
    assert factor(10) == pytest.approx(1e-5)
    assert [OneCycle(1, 1)(step) for step in range(2)] == pytest.approx([1 / 25, 1.0])


def test_gradient_accumulation_is_the_mean_over_batches(make_model, make_table, make_trainer):
    table = make_table(64)
    model, reference = make_model(), make_model()
    trainer = make_trainer(model, table, max_steps=1, gradient_accumulation=4, logging_steps=1, seed=1)
    trainer.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in reference.named_parameters() if "bias" not in n], "weight_decay": 0.01},
            {"params": [p for n, p in reference.named_parameters() if "bias" in n], "weight_decay": 0.0},
        ],
        lr=1e-2,
        fused=True,
    )
    losses = [reference(**table[index]).loss for index in ShuffledBatches(64, 16, seed=1)]
    torch.stack(losses).mean().backward()
    optimizer.step()
    assert losses_of(trainer) == pytest.approx([torch.stack(losses).mean().item()], rel=1e-6)
    for left, right in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_missing_labels_weights_and_spaces_against_plain_numpy(make_model, make_table, make_trainer):
    tasks = [
        {"name": "a", "kind": "binary"},
        {"name": "b", "kind": "binary", "space": "a", "weight": 0.5},
        {"name": "y", "kind": "regression"},
    ]
    model = make_model(tasks=tasks)
    table = make_table(40)
    labels = table.tensors["labels"]
    labels["a"][:7] = NAN
    labels["b"][5:12] = NAN
    labels["y"] = torch.linspace(-1, 1, 40)
    labels["y"][::3] = NAN
    weights = {"a": torch.arange(40.0), "y": torch.linspace(0, 1, 40)}
    table = TensorTable({**table.tensors, "sample_weights": weights})
    trainer = make_trainer(model, table, table, max_steps=1, logging_steps=1, batch_size=64, learning_rate=0.0)
    trainer.train()
    result = trainer.evaluate()

    with torch.no_grad():
        logits = {
            name: values.double().numpy()[:, 0]
            for name, values in model(**{k: table.tensors[k] for k in ("numeric", "categorical")}).logits.items()
        }
    a, b, y = (labels[name].double().numpy() for name in ("a", "b", "y"))
    rows_a, rows_b, rows_y = ~np.isnan(a), ~np.isnan(b) & (a == 1), ~np.isnan(y)

    def cross_entropy(logit, label):
        return np.log1p(np.exp(logit)) - label * logit

    loss_a = np.average(cross_entropy(logits["a"], a)[rows_a], weights=weights["a"].double().numpy()[rows_a])
    loss_b = cross_entropy(logits["b"], b)[rows_b].mean()
    loss_y = np.average((logits["y"] - y)[rows_y] ** 2, weights=weights["y"].double().numpy()[rows_y])
    assert losses_of(trainer)[0] == pytest.approx(loss_a + 0.5 * loss_b + loss_y, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(loss_a + 0.5 * loss_b + loss_y, rel=1e-5)
    assert result["eval_b/loss"] == pytest.approx(loss_b, rel=1e-5)
    assert result["eval_a/log_loss"] == pytest.approx(loss_a, rel=1e-5)
    assert result["eval_y/rmse"] == pytest.approx(math.sqrt(loss_y), rel=1e-5)
    assert result["eval_b/auc"] == pytest.approx(roc_auc_score(b[rows_b], logits["b"][rows_b]), rel=1e-9)
    weight = weights["a"].double().numpy()[rows_a]
    assert result["eval_a/auc"] == pytest.approx(
        roc_auc_score(a[rows_a], logits["a"][rows_a], sample_weight=weight), rel=1e-9
    )
    logged = trainer.state.log_history[0]
    assert logged["loss/y"] == pytest.approx(loss_y, rel=1e-5)


def test_evaluation_does_not_depend_on_the_batch_and_keeps_the_mode(make_model, make_table, make_trainer):
    table = make_table(37)
    results = []
    for size in (5, 37, 4096):
        model = make_model(dropout=0.5).train()
        trainer = make_trainer(model, table, {"first": table, "second": TensorTable(table[:20])}, eval_batch_size=size)
        results.append(trainer.evaluate())
        assert model.training
    keys = [
        key for key in results[0] if "runtime" not in key and "second_samples" not in key and "per_second" not in key
    ]
    assert "eval_first_mean_auc" in keys
    assert "eval_second_b/auc" in keys
    for other in results[1:]:
        assert [other[key] for key in keys] == pytest.approx([results[0][key] for key in keys], rel=1e-5)


def test_predict_gives_logits_by_task(make_model, make_table, make_trainer):
    table = make_table(20)
    output = make_trainer(make_model(), table).predict(table)
    assert {name: values.shape for name, values in output.predictions.items()} == {"a": (20, 1), "b": (20, 1)}
    assert output.metrics["test_a/auc"] == roc_auc_score(output.label_ids["a"], output.predictions["a"][:, 0])


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_the_task(make_model, make_table, make_trainer, value):
    model = make_model()
    bias = next(p for name, p in model.named_parameters() if name.startswith("towers.b") and name.endswith("bias"))
    with torch.no_grad():
        bias.fill_(value)
    with pytest.raises(TrainingDivergedError, match="loss of task 'b' is not finite at step 0"):
        make_trainer(model, make_table(), epochs=1).train()


def test_early_stopping_restores_the_best_weights_even_if_patience_never_runs_out(make_model, make_table, make_trainer):
    model = make_model()
    train, validation = make_table(64), make_table(200, seed=1)
    trainer = make_trainer(
        model, train, validation, epochs=6, learning_rate=0.3, early_stopping=EarlyStopping("mean_auc", patience=100)
    )
    trainer.train()
    scores = [entry["eval_mean_auc"] for entry in trainer.state.log_history if "eval_mean_auc" in entry]
    assert len(scores) == 6
    assert scores[-1] < max(scores), "choose a learning rate at which the last evaluation is not the best"
    assert trainer.evaluate()["eval_mean_auc"] == max(scores)
    assert trainer.state.best_metric == max(scores)


@pytest.mark.parametrize("metric", ["loss", "a/log_loss", "b/auc"])
def test_early_stopping_stops_after_patience_in_the_right_direction(make_model, make_table, make_trainer, metric):
    trainer = make_trainer(
        make_model(),
        make_table(64),
        make_table(64, seed=1),
        epochs=50,
        learning_rate=0.3,
        early_stopping=EarlyStopping(metric, 2),
    )
    trainer.train()
    scores = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    best = scores.index(max(scores) if metric == "b/auc" else min(scores))
    assert len(scores) == best + 3 < 50
    assert trainer.evaluate()[f"eval_{metric}"] == scores[best]


def test_early_stopping_on_a_metric_that_no_task_has(make_model, make_table, make_trainer):
    with pytest.raises(RecipeError, match="unknown metric 'a/aucc'; did you mean 'a/auc'"):
        make_trainer(make_model(), make_table(), make_table(), early_stopping=EarlyStopping("a/aucc"))
    with pytest.raises(RecipeError, match="needs validation rows"):
        make_trainer(make_model(), make_table(), early_stopping=EarlyStopping())
    with pytest.raises(RecipeError, match="one validation table, found several: x, y"):
        make_trainer(make_model(), make_table(), {"x": make_table(), "y": make_table()}, early_stopping=EarlyStopping())


def one_class(table, task):
    table.tensors["labels"][task][:] = 1
    return table


def test_a_metric_that_is_never_defined_does_not_stop_training_and_is_told_once(make_model, make_table, make_trainer):
    validation = one_class(make_table(16), "a")
    trainer = make_trainer(make_model(), make_table(), validation, epochs=5, early_stopping=EarlyStopping("a/auc", 1))
    with pytest.warns(UserWarning, match="task 'a' is not defined") as warned:
        trainer.train()
    assert trainer.state.epoch == 5
    assert trainer.best.weights is None
    assert [str(w.message).startswith("early stopping: a/auc is not defined") for w in warned].count(True) == 1


@pytest.mark.filterwarnings("ignore:auc of task 'a' is not defined")
def test_early_stopping_watches_the_mean_over_the_tasks_that_have_it(make_model, make_table, make_trainer):
    validation = one_class(make_table(64, seed=1), "a")
    trainer = make_trainer(
        make_model(), make_table(), validation, epochs=3, early_stopping=EarlyStopping("mean_auc", 3)
    )
    trainer.train()
    scores = [entry["eval_b/auc"] for entry in trainer.state.log_history if "eval_b/auc" in entry]
    assert trainer.state.best_metric == max(scores)
    assert trainer.best.weights is not None


def test_task_sampling_trains_one_task_per_batch(make_model, make_table, make_trainer):
    table = make_table(60)
    labels = table.tensors["labels"]
    labels["a"][:48] = NAN
    labels["b"][48:] = NAN
    seen = []

    class Recording(type(make_model())):
        def forward(self, *args, **inputs):
            if self.training:
                seen.append((tuple(inputs["tasks"]), tuple(inputs["labels"]), len(inputs["numeric"])))
                assert not torch.isnan(inputs["labels"][inputs["tasks"][0]]).any()
            return super().forward(*args, **inputs)

    model = make_model()
    model.__class__ = Recording
    trainer = make_trainer(
        model, table, epochs=25, batch_size=8, task_sampling=TaskSampling(temperature=1e6), logging_steps=1000
    )
    trainer.train()
    drawn = [tasks[0] for tasks, _, _ in seen]
    assert all(tasks == labels for tasks, labels, _ in seen)
    assert all(2 <= size <= 8 for _, _, size in seen)
    # 12 rows against 48, made equally frequent: with 200 draws, 6 standard deviations are 42.
    assert len(drawn) == 25 * (2 + 6)
    assert abs(drawn.count("a") - 100) < 42


def test_frozen_parameters_and_batch_norms_stay(make_model, make_table, make_trainer):
    model = make_model("home", num_experts=1, expert_dims=[4])
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("towers")}
    assert any("running_mean" in name for name in frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("towers"))
    make_trainer(model, make_table(), epochs=1).train()
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert any(
        not torch.equal(p, q)
        for p, q in zip(
            make_model("home", num_experts=1, expert_dims=[4]).towers.parameters(),
            model.towers.parameters(),
            strict=True,
        )
    )


def test_bf16_and_clipping_train(make_model, make_table, make_trainer):
    trainer = make_trainer(make_model(), make_table(), epochs=2, precision="bf16", max_grad_norm=0.5, logging_steps=1)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
    assert all("grad_norm" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_log_entries_are_json(make_model, make_table, make_trainer):
    trainer = make_trainer(make_model(), make_table(), make_table(), epochs=1, logging_steps=1)
    trainer.train()
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_rows_without_labels_are_refused(make_model, make_table, make_trainer):
    table = make_table()
    unlabelled = TensorTable({"numeric": table.tensors["numeric"], "categorical": table.tensors["categorical"]})
    with pytest.raises(ValueError, match="labels"):
        make_trainer(make_model(), unlabelled, epochs=1).train()
    with pytest.raises(ValueError, match="evaluation needs labels"):
        make_trainer(make_model(), table).evaluate(unlabelled)


def test_everything_frozen_is_refused(make_model, make_table, make_trainer):
    model = make_model()
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter to train"):
        make_trainer(model, make_table(), epochs=1).train()


def test_weights_decay_and_biases_do_not(make_model, make_table, make_trainer):
    trainer = make_trainer(make_model(), make_table(), epochs=1, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert all("bias" in names[id(parameter)] for parameter in groups[1]["params"])
    assert all("bias" not in names[id(parameter)] for parameter in groups[0]["params"])
    assert isinstance(
        make_trainer(make_model(), make_table(), optimizer_name="adam").create_optimizer(), torch.optim.Adam
    )
