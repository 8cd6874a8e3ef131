"""Dense tasks: each kind's loss against loops over pixels in float64, what is missing, and what is refused.

Shapes: `B` pictures, `C` outputs, `H`, `W` height and width.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mtl.kinds import KINDS
from moe_mtl.tasks import Task

NAN = float("nan")
OUTPUTS = {"segmentation": 4, "saliency": 1, "edges": 1, "normals": 3, "depth": 1}
B, H, W = 3, 4, 5


def task_of(kind: str, **fields: Any) -> Task:
    return Task("t", kind, num_outputs=OUTPUTS[kind], **fields)


def batch_of(task: Task, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels in float64, a quarter of the pixels missing."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, task.num_outputs, H, W, generator=g, dtype=torch.float64) * 2
    if task.kind == "segmentation":
        labels = torch.randint(task.num_outputs, (B, H, W), generator=g)
    elif task.kind == "normals":
        labels = torch.randn(B, 3, H, W, generator=g, dtype=torch.float64)
        labels = labels / labels.norm(dim=1, keepdim=True)
    elif task.kind == "depth":
        labels = torch.randn(B, H, W, generator=g, dtype=torch.float64)
    else:
        labels = (torch.rand(B, H, W, generator=g, dtype=torch.float64) < 0.3).double()
    missing = torch.rand(B, H, W, generator=g) < 0.25
    where = missing[:, None].expand_as(labels) if labels.dim() == 4 else missing
    return logits, labels.masked_fill(where, task.missing)


def is_missing(label: Any) -> bool:
    values = label if isinstance(label, list) else [label]
    return any(value == -100 or value != value for value in values)


def pixels(logits: Tensor, labels: Tensor) -> list[tuple[int, list[float], Any]]:
    """Picture, logits and label of every labelled pixel, as plain numbers."""
    out = []
    for b in range(len(logits)):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                label = (labels[b, :, y, x] if labels.dim() == 4 else labels[b, y, x]).tolist()
                if not is_missing(label):
                    out.append((b, logits[b, :, y, x].tolist(), label))
    return out


def loss_by_hand(kind: str, logits: Tensor, labels: Tensor, weights: list[float], edge: float = 0.95) -> float:
    found = pixels(logits, labels)
    total = sum(weights[b] for b, _, _ in found)
    if kind == "saliency":
        positive = sum(weights[b] for b, _, y in found if y >= 0.5)
        factor = {True: (total - positive) / total, False: positive / total}
    else:
        factor = {True: edge, False: 1 - edge}
    top = 0.0
    for b, z, y in found:
        if kind == "segmentation":
            loss = math.log(sum(math.exp(v) for v in z)) - z[y]
        elif kind == "normals":
            length = math.sqrt(sum(v * v for v in z))
            loss = sum(abs(v / length - n) for v, n in zip(z, y, strict=True)) / 3
        elif kind == "depth":
            loss = abs(z[0] - y)
        else:
            p = 1 / (1 + math.exp(-z[0]))
            loss = -factor[y >= 0.5] * math.log(p if y >= 0.5 else 1 - p)
        top += weights[b] * loss
    return top / total


@pytest.mark.parametrize("edge", [0.925, 0.5, 0.05])
def test_an_edge_pixel_weighs_what_the_task_says(edge: float) -> None:
    task = Task("t", "edges", edge_weight=edge)
    logits, labels = batch_of(task, 0)
    expected = loss_by_hand("edges", logits, labels, [1.0] * B, edge)
    assert task.loss(logits, labels).item() == pytest.approx(expected, rel=1e-10)


def test_what_is_of_edges_alone() -> None:
    """Saved only where it differs, so that tasks saved without it are the same task."""
    assert Task("t", "edges").to_dict() == Task("t", "edges", edge_weight=0.95, edge_tolerance=0.0075).to_dict()
    assert Task("t", "edges").to_dict() == {"name": "t", "kind": "edges"}
    other = Task("t", "edges", edge_weight=0.925, edge_tolerance=0.011)
    assert other.to_dict() == {"name": "t", "kind": "edges", "edge_weight": 0.925, "edge_tolerance": 0.011}
    assert Task.from_dict(other.to_dict()) == other
    for field in ("edge_weight", "edge_tolerance"):
        for value in (0.0, 1.0, -0.1, float("nan"), 1, True, "0.5", None):
            with pytest.raises(
                ValueError, match=f"task 't': {field} must be a number between 0 and 1, found {value!r}"
            ):
                Task("t", "edges", **{field: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"task 't': a saliency task has no {field}, found 0.5"):
            Task("t", "saliency", **{field: 0.5})  # type: ignore[arg-type]


def test_every_dense_kind_is_held_to_a_reference() -> None:
    assert {name for name, kind in KINDS.items() if kind.dense} == set(OUTPUTS)
    assert task_of("depth").dense
    assert not Task("t", "binary").dense


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_loss_is_the_mean_over_counted_pixels(kind: str, weighted: bool) -> None:
    task = task_of(kind)
    for seed in range(3):
        logits, labels = batch_of(task, seed)
        weights = [0.5, 0.0, 2.0] if weighted else [1.0] * B
        got = task.loss(logits, labels, torch.tensor(weights, dtype=torch.float64) if weighted else None)
        assert got.item() == pytest.approx(loss_by_hand(kind, logits, labels, weights), rel=1e-10)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_weight_of_zero_is_a_picture_left_out_and_a_mask_likewise(kind: str) -> None:
    task = task_of(kind)
    logits, labels = batch_of(task)
    alone = task.loss(logits[1:], labels[1:])
    torch.testing.assert_close(task.loss(logits, labels, torch.tensor([0.0, 1.0, 1.0])), alone)
    torch.testing.assert_close(task.loss(logits, labels, mask_B=torch.tensor([False, True, True])), alone)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_gradient_reaches_the_labelled_pixels_alone(kind: str) -> None:
    task = task_of(kind)
    logits, labels = batch_of(task)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: task.loss(z, labels), (logits,))
    task.loss(logits, labels).backward()
    counted = task.counted(labels)
    assert 0 < counted.sum() < counted.numel()
    reached = logits.grad.abs().sum(1) > 0
    assert torch.equal(reached, counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_maps_without_any_label_give_zero_and_no_gradient(kind: str, dtype: torch.dtype) -> None:
    task = task_of(kind)
    labels = torch.full_like(batch_of(task)[1], task.missing)
    for value in (0.0, 90.0):
        logits = torch.full((B, task.num_outputs, H, W), value, dtype=dtype, requires_grad=True)
        loss = task.loss(logits, labels)
        (50 * loss).backward()  # a task's weight must not make 0 times infinity of it
        assert loss.item() == 0
        assert bool((logits.grad == 0).all())
    assert not task.labelled(labels).any()


def test_a_picture_is_labelled_where_one_of_its_pixels_is() -> None:
    labels = torch.full((3, 2, 2), -100)
    labels[1, 0, 1] = 2
    assert task_of("segmentation").labelled(labels).tolist() == [False, True, False]
    normals = torch.full((2, 3, 2, 2), 0.5)
    normals[0, 1] = NAN  # one component is missing: so is the vector
    assert task_of("normals").labelled(normals).tolist() == [False, True]


def test_saliency_of_one_class_has_no_loss_as_in_hed_and_soft_labels_are_cut_at_half() -> None:
    task = task_of("saliency")
    logits = torch.randn(B, 1, H, W)
    assert task.loss(logits, torch.ones(B, H, W)).item() == 0
    soft = torch.rand(B, H, W)
    assert torch.equal(task.loss(logits, soft), task.loss(logits, (soft >= 0.5).float()))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_terms_of_batches_add_up(kind: str) -> None:
    task = task_of(kind)
    logits, labels = batch_of(task)
    if kind == "saliency":  # whose balance is a batch's own
        labels[:] = labels[:1]
    parts = [task.loss_terms(logits[i : i + 1], labels[i : i + 1]) for i in range(B)]
    total, weight = (sum(values) for values in zip(*parts, strict=True))
    assert (total / weight).item() == pytest.approx(task.loss(logits, labels).item(), rel=1e-12)


def test_half_precision_maps_are_lifted_before_the_loss() -> None:
    logits, labels = batch_of(task_of("depth"))
    loss = task_of("depth").loss(logits.bfloat16(), labels.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_by_hand("depth", logits.bfloat16().double(), labels, [1.0] * B), rel=1e-5)


def test_a_vector_of_length_zero_has_a_finite_gradient() -> None:
    logits = torch.zeros(1, 3, 1, 1, requires_grad=True)
    task_of("normals").loss(logits, torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)).backward()
    assert bool(logits.grad.isfinite().all())


def test_predictions_by_kind() -> None:
    logits = torch.randn(B, 4, H, W)
    assert torch.allclose(task_of("segmentation").predict(logits).sum(1), torch.ones(B, H, W))
    assert torch.allclose(task_of("edges").predict(logits[:, :1]), torch.sigmoid(logits[:, 0]))
    assert torch.allclose(task_of("saliency").predict(logits[:, :1]), torch.sigmoid(logits[:, 0]))
    assert torch.equal(task_of("depth").predict(logits[:, :1]), logits[:, 0])
    assert torch.allclose(task_of("normals").predict(logits[:, :3]).norm(dim=1), torch.ones(B, H, W))


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("segmentation", torch.zeros(B, H, W), "expected torch.int64"),
        ("segmentation", torch.full((B, H, W), 4), r"class ids in \[0, 3\] or -100"),
        ("segmentation", torch.full((B, H, W), 255), r"class ids in \[0, 3\] or -100"),
        ("segmentation", torch.full((B, H, W), -1), r"class ids in \[0, 3\] or -100"),
        (
            "segmentation",
            torch.zeros(B, H, 2 * W, dtype=torch.int64),
            r"expected shape \[3, 4, 5\], found \[3, 4, 10\]",
        ),
        ("edges", torch.full((B, H, W), 255.0), r"values in \[0, 1\] or NaN, found 255"),
        ("edges", torch.zeros(B, 1, H, W), r"expected shape \[3, 4, 5\]"),
        ("saliency", torch.full((B, H, W), -0.5), r"values in \[0, 1\]"),
        ("normals", torch.full((B, 3, H, W), 127.0), r"values in \[-1.001, 1.001\]"),
        ("normals", torch.zeros(B, H, W), r"expected shape \[3, 3, 4, 5\]"),
        ("depth", torch.full((B, H, W), math.inf), "expected finite values"),
    ],
)
def test_labels_that_do_not_fit_are_refused(kind: str, labels: Tensor, message: str) -> None:
    task = task_of(kind)
    with pytest.raises(ValueError, match=message):
        task.loss(torch.zeros(B, task.num_outputs, H, W), labels)


def test_tasks_and_logits_that_do_not_fit_are_refused() -> None:
    for kind, outputs in (("segmentation", 1), ("edges", 2), ("normals", 1), ("depth", 3)):
        with pytest.raises(ValueError, match="num_outputs"):
            Task("t", kind, num_outputs=outputs)
    with pytest.raises(ValueError, match="a edges task has the metrics ods_f; found 'auc'"):
        Task("t", "edges", metrics=("auc",))
    with pytest.raises(ValueError, match="a depth task has no space"):
        Task("t", "depth", space="other")
    with pytest.raises(ValueError, match=r"logits of task 't': expected \[B, C, H, W\], found \[3, 1\]"):
        task_of("edges").loss(torch.zeros(3, 1), torch.zeros(3, H, W))
    with pytest.raises(ValueError, match=r"logits of task 't': expected \[B, C\], found \[3, 1, 4, 5\]"):
        Task("t", "binary").loss(torch.zeros(3, 1, 4, 5), torch.zeros(3))
