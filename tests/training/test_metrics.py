"""Metrics against scikit-learn and against sums written out."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from moe_mtl.tasks import Task
from moe_mtl.training.metrics import compute_metrics, counted_rows, is_maximised, mean_metrics, standard_errors

NAN = float("nan")
ROWS = 200


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def one(task, logits, label, **more):
    return compute_metrics([task], {task.name: logits}, {task.name: label}, **more)[task.name]


def test_binary(rng):
    task = Task("a", "binary", metrics=("auc", "log_loss", "accuracy", "f1"))
    logits = torch.tensor(rng.normal(size=(ROWS, 1)), dtype=torch.float32)
    label = torch.tensor(rng.integers(0, 2, ROWS), dtype=torch.float32)
    label[:20] = NAN
    weight = torch.tensor(rng.uniform(size=ROWS))
    score, truth = torch.sigmoid(logits[20:, 0]).double().numpy(), label[20:].numpy()
    for given, w in ((None, None), ({"a": weight}, weight[20:].numpy())):
        found = one(task, logits, label, weights=given)
        assert found["auc"] == pytest.approx(sk.roc_auc_score(truth, score, sample_weight=w))
        assert found["log_loss"] == pytest.approx(sk.log_loss(truth, score, sample_weight=w))
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, score > 0.5, sample_weight=w))
        assert found["f1"] == pytest.approx(sk.f1_score(truth, score > 0.5, sample_weight=w))


def test_multiclass(rng):
    task = Task("c", "multiclass", 4, metrics=("auc", "log_loss", "accuracy", "f1"))
    logits = torch.tensor(rng.normal(size=(ROWS, 4)), dtype=torch.float32)
    label = torch.tensor(rng.integers(0, 4, ROWS))
    label[::9] = -100
    kept = (label != -100).numpy()
    score, truth = torch.softmax(logits, -1).double().numpy()[kept], label.numpy()[kept]
    found = one(task, logits, label)
    areas = [sk.roc_auc_score(truth == c, score[:, c]) for c in range(4)]
    assert found["auc"] == pytest.approx(np.mean(areas))
    assert found["log_loss"] == pytest.approx(-np.log(score[np.arange(len(truth)), truth]).mean())
    assert found["accuracy"] == pytest.approx((score.argmax(1) == truth).mean())
    assert found["f1"] == pytest.approx(sk.f1_score(truth, score.argmax(1), average="macro"))
    without = torch.where(label == 3, torch.tensor(-100), label)  # a class that has no row
    kept = (without != -100).numpy()
    score, truth = torch.softmax(logits, -1).double().numpy()[kept], without.numpy()[kept]
    assert one(task, logits, without)["auc"] == pytest.approx(
        np.mean([sk.roc_auc_score(truth == c, score[:, c]) for c in range(3)])
    )


def test_multilabel(rng):
    task = Task("m", "multilabel", 3, metrics=("auc", "log_loss", "accuracy", "f1"))
    logits = torch.tensor(rng.normal(size=(ROWS, 3)), dtype=torch.float32)
    label = torch.tensor(rng.integers(0, 2, (ROWS, 3)), dtype=torch.float32)
    label[5] = NAN
    label[:, 2] = torch.where(
        torch.isnan(label[:, 2]), label[:, 2], torch.zeros(ROWS)
    )  # one class only: left out of the AUC
    kept = np.arange(ROWS) != 5
    score, truth = torch.sigmoid(logits).double().numpy()[kept], label.numpy()[kept]
    found = one(task, logits, label)
    assert found["auc"] == pytest.approx(np.mean([sk.roc_auc_score(truth[:, c], score[:, c]) for c in range(2)]))
    expected = -(truth * np.log(score) + (1 - truth) * np.log(1 - score)).mean()
    assert found["log_loss"] == pytest.approx(expected)
    right = ((score > 0.5) == truth).mean(1)
    assert found["accuracy"] == pytest.approx(right.mean())
    weight = torch.tensor(rng.uniform(size=ROWS))
    weighted = one(task, logits, label, weights={"m": weight})["accuracy"]
    assert weighted == pytest.approx(np.average(right, weights=weight.numpy()[kept]))
    single = Task("m", "multilabel", 1, metrics=("accuracy",))
    assert one(single, logits[:, :1], label[:, :1])["accuracy"] == pytest.approx(((score > 0.5) == truth)[:, 0].mean())


def test_regression_in_the_users_units(rng):
    task = Task("y", "regression", 2)
    logits = torch.tensor(rng.normal(size=(ROWS, 2)), dtype=torch.float32)
    label = torch.tensor(rng.normal(size=(ROWS, 2)), dtype=torch.float32)
    label[3, 1] = NAN
    weight = torch.tensor(rng.uniform(size=ROWS))
    scale = torch.tensor([2.0, 3.0])
    found = one(task, logits, label, weights={"y": weight}, unscale=lambda name, values: values.double() * scale + 7)
    kept = np.arange(ROWS) != 3
    error = ((logits - label) * scale).double().numpy()[kept]
    w = weight.numpy()[kept]
    assert found["rmse"] == pytest.approx(math.sqrt(np.average((error**2).mean(1), weights=w)))
    assert found["mae"] == pytest.approx(np.average(np.abs(error).mean(1), weights=w))
    column = Task("y", "regression")
    assert one(column, logits[:, :1], label[:, 0])["mae"] == pytest.approx(
        np.abs((logits - label)[:, 0].double().numpy()).mean(), rel=1e-6
    )


def test_group_auc_by_hand():
    task = Task("a", "binary", metrics=("group_auc",))
    groups = np.array([7, 7, 7, 3, 3, 9, 9, 9, 9])
    label = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1, 0])
    logits = torch.tensor([[0.5], [0.1], [0.9], [0.3], [0.2], [2.0], [1.0], [0.0], [-1.0]])
    # group 7: 1 of 2 pairs; group 3 has one class; group 9: (2>1, 2>-1, 0>-1) of 4 pairs
    found = one(task, logits, label, groups=groups)
    assert found["group_auc"] == pytest.approx((3 * 0.5 + 4 * 0.75) / 7)
    weight = torch.tensor([1.0, 1, 1, 1, 1, 2, 2, 2, 2])
    found = one(task, logits, label, groups=groups, weights={"a": weight})
    assert found["group_auc"] == pytest.approx((3 * 0.5 + 8 * 0.75) / 11)
    with pytest.raises(ValueError, match="column of the groups must be named"):
        one(task, logits, label)


def test_space_and_missing_labels_decide_which_rows_count():
    labels = {"click": torch.tensor([1.0, 1, 0, NAN]), "buy": torch.tensor([1.0, NAN, 1, 1])}
    buy = Task("buy", "binary", space="click")
    assert counted_rows(buy, labels).tolist() == [True, False, False, False]
    assert counted_rows(Task("buy", "binary"), labels).tolist() == [True, False, True, True]


@pytest.mark.parametrize("label", [torch.ones(5), torch.full((5,), NAN)])
def test_what_is_not_defined_is_nan_with_a_warning_that_names_the_task(label):
    task = Task("a", "binary", metrics=("auc",))
    with pytest.warns(UserWarning, match="'a'"):
        assert math.isnan(one(task, torch.randn(5, 1), label)["auc"])


def test_scores_that_are_not_finite_are_nan_and_no_crash():
    logits = torch.tensor([[NAN], [1.0], [0.0]])
    with pytest.warns(UserWarning, match="'a' has scores that are not finite"):
        assert math.isnan(one(Task("a", "binary"), logits, torch.tensor([0.0, 1, 0]))["log_loss"])


def test_certain_and_wrong_is_a_finite_log_loss():
    found = one(Task("a", "binary", metrics=("log_loss",)), torch.tensor([[200.0], [-200.0]]), torch.tensor([0.0, 1.0]))
    assert 30 < found["log_loss"] < 100
    found = one(Task("c", "multiclass", 2, metrics=("log_loss",)), torch.tensor([[200.0, -200.0]]), torch.tensor([1]))
    assert 30 < found["log_loss"] < 100


def test_directions():
    assert all(map(is_maximised, ["income/auc", "mean_accuracy", "a/group_auc", "mean_f1"]))
    assert not any(map(is_maximised, ["loss", "income/loss", "mean_log_loss", "y/rmse", "y/mae"]))
    with pytest.raises(ValueError, match="unknown metric 'income/acc'"):
        is_maximised("income/acc")
    assert mean_metrics({"a": {"auc": 0.5, "f1": 1.0}, "b": {"auc": 0.7}}) == pytest.approx(
        {"mean_auc": 0.6, "mean_f1": 1.0}
    )


def test_a_mean_is_taken_over_the_tasks_on_whose_rows_the_metric_is_defined():
    found = mean_metrics({"a": {"auc": 0.5, "f1": NAN}, "b": {"auc": NAN}, "c": {"auc": 0.7}})
    assert found["mean_auc"] == pytest.approx(0.6)
    assert math.isnan(found["mean_f1"])


def test_standard_error_of_a_mean(rng):
    values = rng.normal(size=4000)
    task = Task("y", "regression", metrics=("mae",))
    logits, labels = {"y": torch.tensor(values[:, None])}, {"y": torch.zeros(4000)}
    found = standard_errors([task], logits, labels, resamples=400)["y"]["mae"]
    assert found == pytest.approx(np.abs(values).std() / math.sqrt(4000), rel=0.15)
