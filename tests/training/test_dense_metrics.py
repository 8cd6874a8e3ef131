"""Streamed metrics of dense tasks against loops over pixels in float64.

Shapes: `B` pictures, `C` outputs, `H`, `W` height and width.
"""

import math

import numpy as np
import pytest
import torch

from moe_mtl.kinds import KINDS
from moe_mtl.tasks import Task
from moe_mtl.training.dense_metrics import DenseMetrics
from moe_mtl.training.edge_measure import EdgeCounts
from moe_mtl.training.metrics import is_maximised, mean_metrics
from moe_mtl.training.recipe import EarlyStopping, RecipeError
from moe_mtl.training.stopping import BestWeights

NAN = float("nan")
B, H, W = 5, 4, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def measured(task, logits, labels, size=2):
    """In batches of `size`."""
    metrics = DenseMetrics(task)
    for start in range(0, len(logits), size):
        metrics.add(logits[start : start + size], labels[start : start + size])
    return metrics.values()


def drop(labels, generator, task, share=0.3):
    missing = torch.rand(B, H, W, generator=generator) < share
    missing[0] = True  # a picture without any label
    where = missing[:, None].expand_as(labels) if labels.dim() == 4 else missing
    return labels.masked_fill(where, task.missing), ~missing


def test_segmentation(generator):
    task = Task("s", "segmentation", 4, metrics=("mean_iou", "pixel_accuracy"))
    logits = torch.randn(B, 4, H, W, generator=generator)
    labels, kept = drop(torch.randint(3, (B, H, W), generator=generator), generator, task)
    logits[:, 3] = -9  # class 3 is neither labelled nor predicted: left out
    found = measured(task, logits, labels)
    pairs = [(int(labels[i]), int(logits.argmax(1)[i])) for i in map(tuple, kept.nonzero().tolist())]
    iou = []
    for c in range(3):
        both = sum(y == c and z == c for y, z in pairs)
        either = sum(y == c or z == c for y, z in pairs)
        iou.append(both / either)
    assert found["mean_iou"] == pytest.approx(sum(iou) / 3, rel=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(sum(y == z for y, z in pairs) / len(pairs), rel=1e-12)
    logits[1, 3] = 9  # a class that is predicted wherever and never right counts 0
    assert measured(task, logits, labels)["mean_iou"] < found["mean_iou"]


def test_saliency(generator):
    task = Task("s", "saliency", metrics=("mean_iou", "max_f"))
    logits = torch.randn(B, 1, H, W, generator=generator)
    labels, kept = drop(torch.rand(B, H, W, generator=generator), generator, task)
    found = measured(task, logits, labels)
    places = [tuple(i) for i in kept.nonzero().tolist()]
    pairs = [(float(labels[i]) >= 0.5, 1 / (1 + math.exp(-float(logits[:, 0][i])))) for i in places]
    iou = []
    for c in (False, True):
        both = sum(y == c and (p > 0.5) == c for y, p in pairs)
        iou.append(both / sum(y == c or (p > 0.5) == c for y, p in pairs))
    assert found["mean_iou"] == pytest.approx(sum(iou) / 2, rel=1e-12)
    best = 0.0
    for k in range(1, 100):
        true = sum(y and p >= k / 100 for y, p in pairs)
        precision = true / max(1, sum(p >= k / 100 for _, p in pairs))
        recall = true / sum(y for y, _ in pairs)
        if true:
            best = max(best, 2 * precision * recall / (precision + recall))
    assert found["max_f"] == pytest.approx(best, rel=1e-12)


def test_normals(generator):
    task = Task("n", "normals", 3)
    logits = torch.randn(B, 3, H, W, generator=generator) * 3
    labels = torch.nn.functional.normalize(torch.randn(B, 3, H, W, generator=generator), dim=1)
    labels, kept = drop(labels, generator, task)
    angles = []
    for b, y, x in kept.nonzero().tolist():
        p, n = logits[b, :, y, x].double().numpy(), labels[b, :, y, x].double().numpy()
        angles.append(math.degrees(math.acos(p @ n / math.sqrt((p @ p) * (n @ n)))))
    assert measured(task, logits, labels)["mean_angle"] == pytest.approx(np.mean(angles), rel=1e-9)
    up = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    for vector, degrees in (([0.0, 0, 2], 0), ([0.0, 0, -1], 180), ([5.0, 0, 0], 90), ([1e-9, 0, 1], 5.7295779513e-8)):
        found = measured(task, torch.tensor(vector, dtype=torch.float64).reshape(1, 3, 1, 1), up)
        assert found["mean_angle"] == pytest.approx(degrees, rel=1e-8, abs=1e-12)


def test_depth(generator):
    task = Task("d", "depth", metrics=("abs_error", "rmse"))
    logits = torch.randn(B, 1, H, W, generator=generator)
    labels, kept = drop(torch.randn(B, H, W, generator=generator) * 4, generator, task)
    error = (logits[:, 0].double() - labels.double())[kept].tolist()
    found = measured(task, logits, labels)
    assert list(found) == ["abs_error", "rmse"]
    assert found["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in error) / len(error)), rel=1e-12)
    assert found["abs_error"] == pytest.approx(sum(map(abs, error)) / len(error), rel=1e-12)


def test_edges(generator):
    found = []
    for task, tolerance in ((Task("e", "edges"), 0.0075), (Task("e", "edges", edge_tolerance=0.3), 0.3)):
        generator.manual_seed(0)
        logits = torch.randn(B, 1, H, W, generator=generator)
        labels, kept = drop((torch.rand(B, H, W, generator=generator) < 0.3).float(), generator, task)
        counts = EdgeCounts(tolerance)
        counts.add(torch.sigmoid(logits[:, 0].double()).numpy(), (labels > 0.5).numpy(), kept.numpy())
        found.append(measured(task, logits, labels)["ods_f"])
        assert found[-1] == pytest.approx(counts.best_f(), rel=1e-12)
    assert found[1] > found[0]  # two pixels off are within the wider one


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.dense])
def test_batches_of_any_size_give_the_same_and_every_allowed_metric_is_measured(kind, generator):
    spec = KINDS[kind]
    task = Task("t", kind, spec.outputs[0], metrics=spec.allowed_metrics)
    logits = torch.randn(B, task.num_outputs, H, W, generator=generator)
    if spec.label_dtype == torch.int64:
        labels = torch.randint(task.num_outputs, (B, H, W), generator=generator)
    else:
        labels = torch.rand((B, 3, H, W) if kind == "normals" else (B, H, W), generator=generator)
    labels, _ = drop(labels, generator, task)
    whole = measured(task, logits, labels, B)
    assert list(whole) == list(spec.allowed_metrics)
    assert all(math.isfinite(value) for value in whole.values())
    assert measured(task, logits, labels, 1) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.dense])
def test_nothing_labelled_is_nan_with_a_warning(kind):
    task = Task("t", kind, KINDS[kind].outputs[0])
    shape = (2, 3, H, W) if kind == "normals" else (2, H, W)
    labels = torch.full(shape, task.missing, dtype=KINDS[kind].label_dtype)
    with pytest.warns(UserWarning, match="'t' has no labelled pixel"):
        found = measured(task, torch.zeros(2, task.num_outputs, H, W), labels)
    assert all(math.isnan(value) for value in found.values())


def test_no_positive_pixel_and_predictions_that_are_not_finite_are_nan_with_a_warning():
    for kind, metric in (("edges", "ods_f"), ("saliency", "max_f")):
        task = Task("t", kind, metrics=(metric,))
        with pytest.warns(UserWarning, match="no pixel of the positive class"):
            assert math.isnan(measured(task, torch.zeros(2, 1, H, W), torch.zeros(2, H, W))[metric])
    logits = torch.zeros(2, 1, H, W)
    logits[0, 0, 0, 0] = NAN
    with pytest.warns(UserWarning, match="not finite"):
        assert math.isnan(measured(Task("t", "depth"), logits, torch.zeros(2, H, W))["rmse"])


def test_only_dense_tasks_and_fitting_labels_are_taken():
    with pytest.raises(ValueError, match="expected a dense kind, found 'binary'"):
        DenseMetrics(Task("t", "binary"))
    with pytest.raises(ValueError, match="expected shape"):
        DenseMetrics(Task("t", "depth")).add(torch.zeros(2, 1, H, W), torch.zeros(2, H, W + 1))


def test_directions_and_means_over_tasks():
    assert all(map(is_maximised, ["s/mean_iou", "mean_iou", "e/ods_f", "mean_ods_f", "mean_pixel_accuracy", "a/max_f"]))
    assert not any(map(is_maximised, ["n/mean_angle", "mean_angle", "d/abs_error", "mean_rmse"]))
    metrics = {"s": {"mean_iou": 0.5}, "p": {"mean_iou": 0.7}, "e": {"ods_f": 0.3}}
    assert mean_metrics(metrics) == pytest.approx({"mean_iou": 0.6, "mean_ods_f": 0.3})
    reported = {name: list(values) for name, values in metrics.items()}
    assert BestWeights(EarlyStopping("mean_iou"), reported).sign == 1
    with pytest.raises(RecipeError, match="mean_mean_iou"):
        BestWeights(EarlyStopping("mean_mean_iou"), reported)
