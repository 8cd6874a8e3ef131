"""Tasks: what they accept, and every kind's loss against a loop over rows in float64."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_mtl.kinds import KINDS, METRICS
from moe_mtl.tasks import Task, UnknownTaskError, check_task_names, parse_tasks

NAN = float("nan")
KIND_OUTPUTS = {"binary": 1, "multiclass": 4, "multilabel": 3, "regression": 2}


def task_of(kind: str, **fields: Any) -> Task:
    return Task("t", kind, **{"num_outputs": KIND_OUTPUTS[kind], **fields})


def labels_of(task: Task, rows: int, generator: torch.Generator) -> Tensor:
    if task.kind == "multiclass":
        return torch.randint(task.num_outputs, (rows,), generator=generator)
    shape = (rows,) if task.num_outputs == 1 else (rows, task.num_outputs)
    if task.kind == "regression":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.randint(2, shape, generator=generator).double()


def row_loss_by_hand(kind: str, logits: list[float], label: Any) -> float | None:
    """One row's loss; None where it has no label."""
    labels = label if isinstance(label, list) else [label]
    if kind == "multiclass":
        return None if label == -100 else math.log(sum(math.exp(z) for z in logits)) - logits[label]
    if any(math.isnan(value) for value in labels):
        return None
    if kind == "regression":
        return sum((z - y) ** 2 for z, y in zip(logits, labels, strict=True)) / len(logits)
    entropy = [
        math.log1p(math.exp(-z)) * y + math.log1p(math.exp(z)) * (1 - y) for z, y in zip(logits, labels, strict=True)
    ]
    return sum(entropy) / len(entropy)


def loss_by_hand(kind: str, logits: Tensor, labels: Tensor, weights: list[float], counts: list[bool]) -> float:
    top = bottom = 0.0
    for z, y, weight, count in zip(logits.tolist(), labels.tolist(), weights, counts, strict=True):
        loss = row_loss_by_hand(kind, z, y)
        if loss is not None and count:
            top, bottom = top + weight * loss, bottom + weight
    return top / bottom if bottom else 0.0


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(sorted(KIND_OUTPUTS)), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_loss_of_every_kind(kind: str, seed: int, weighted: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    task = task_of(kind)
    logits = torch.randn(6, task.num_outputs, generator=generator, dtype=torch.float64) * 3
    labels = labels_of(task, 6, generator)
    missing = torch.rand(6, generator=generator) < 0.3
    labels[missing] = task.missing
    weights = torch.rand(6, generator=generator, dtype=torch.float64).round(decimals=1) if weighted else None
    mask = torch.rand(6, generator=generator) < 0.7 if masked else None
    got = task.loss(logits, labels, weights, mask)
    plain_weights = [1.0] * 6 if weights is None else weights.tolist()
    expected = loss_by_hand(kind, logits, labels, plain_weights, [True] * 6 if mask is None else mask.tolist())
    assert got.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kind", sorted(KIND_OUTPUTS))
def test_missing_labels_give_no_gradient_and_the_rest_the_right_one(kind: str) -> None:
    task = task_of(kind)
    generator = torch.Generator().manual_seed(0)
    labels = labels_of(task, 5, generator)
    labels[1] = labels[4] = task.missing
    logits = torch.randn(5, task.num_outputs, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: task.loss(z, labels), (logits,))
    task.loss(logits, labels).backward()
    assert bool((logits.grad[[1, 4]] == 0).all())
    assert bool((logits.grad[[0, 2, 3]].abs().sum(1) > 0).all())


@pytest.mark.parametrize("kind", sorted(KIND_OUTPUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_label_at_all_is_a_loss_of_zero(kind: str, dtype: torch.dtype) -> None:
    task = task_of(kind)
    labels = labels_of(task, 3, torch.Generator()).fill_(task.missing)
    logits = torch.full((3, task.num_outputs), 90.0, dtype=dtype, requires_grad=True)
    for weights, mask in ((None, None), (torch.zeros(3), None), (None, torch.zeros(3, dtype=torch.bool))):
        loss = task.loss(logits, labels, weights, mask)
        assert loss.item() == 0
        logits.grad = None
        loss.backward()
        assert bool((logits.grad == 0).all())


@pytest.mark.parametrize("kind", sorted(KIND_OUTPUTS))
def test_an_empty_batch_has_a_loss_of_zero(kind: str) -> None:
    task = task_of(kind)
    logits = torch.zeros(0, task.num_outputs, requires_grad=True)
    loss = task.loss(logits, labels_of(task, 0, torch.Generator()))
    loss.backward()
    assert loss.item() == 0


def test_half_precision_logits_are_lifted_before_the_loss() -> None:
    logits = torch.full((1000, 1), 0.3, dtype=torch.bfloat16)
    loss = Task("t", "binary").loss(logits, torch.ones(1000))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-logits[0].item())), rel=1e-6)


def test_soft_binary_labels_and_single_column_regression() -> None:
    logits = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    soft = Task("t", "binary").loss(logits, torch.tensor([0.25, 1.0]))
    expected = (0.25 * math.log1p(math.exp(-2)) + 0.75 * math.log1p(math.exp(2)) + math.log1p(math.exp(1))) / 2
    assert soft.item() == pytest.approx(expected)
    flat = Task("t", "regression").loss(logits, torch.tensor([1.0, -3.0]))
    assert flat.item() == pytest.approx((1 + 4) / 2)  # [B, 1] against [B] must not broadcast to [B, B]
    assert flat == Task("t", "regression").loss(logits, torch.tensor([[1.0], [-3.0]]))


def test_predict() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    assert Task("t", "binary").predict(logits[:, :1]).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    classes = Task("t", "multiclass", 2).predict(logits)
    assert classes[0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    assert Task("t", "multilabel", 2).predict(logits)[1].tolist() == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    )
    assert Task("t", "multilabel", 1).predict(logits[:, :1]).shape == (2, 1)
    assert torch.equal(Task("t", "regression", 2).predict(logits), logits)
    assert torch.equal(Task("t", "regression").predict(logits[:, :1]), logits[:, 0])


WRONG_LABELS: list[tuple[str, Any, str]] = [
    ("binary", torch.tensor([0, 1]), "expected torch.float32 .binary., found torch.int64"),
    ("binary", torch.tensor([True, False]), "found torch.bool"),
    ("binary", torch.tensor([[0.0], [1.0]]), r"expected shape \[2\], found \[2, 1\]"),
    ("binary", torch.tensor([0.0]), r"expected shape \[2\], found \[1\]"),
    ("binary", torch.tensor([0.0, 2.0]), r"expected values in \[0, 1\] or NaN, found 0.0 to 2.0"),
    ("binary", torch.tensor([-1.0, NAN]), r"found -1.0 to 0.0"),
    ("binary", torch.tensor([math.inf, NAN]), r"to inf"),
    ("binary", [0.0, 1.0], "expected a tensor, found list"),
    ("multiclass", torch.tensor([0.0, 1.0]), "expected torch.int64 .multiclass., found torch.float32"),
    ("multiclass", torch.tensor([0, 1], dtype=torch.int32), "found torch.int32"),
    (
        "multiclass",
        torch.tensor([0, 4]),
        r"expected class ids in \[0, 3\] or -100 for missing, found values from 0 to 4",
    ),
    ("multiclass", torch.tensor([-1, 3]), "found values from -1 to 3"),
    ("multiclass", torch.tensor([-100, -99]), "found values from -100 to -99"),
    ("multiclass", torch.tensor([[0, 1]]), r"expected shape \[2\], found \[1, 2\]"),
    ("multilabel", torch.zeros(2), r"expected shape \[2, 3\], found \[2\]"),
    ("multilabel", torch.tensor([[0.0, 1.0, 7.0]] * 2), r"found 0.0 to 7.0"),
    ("regression", torch.zeros(2), r"expected shape \[2, 2\], found \[2\]"),
    ("regression", torch.tensor([[0.0, math.inf], [0.0, NAN]]), "expected finite values or NaN, found infinity"),
    ("regression", torch.zeros(2, 2, dtype=torch.int64), "expected torch.float32 .regression., found torch.int64"),
]


@pytest.mark.parametrize(("kind", "labels", "message"), WRONG_LABELS)
def test_wrong_labels_are_told_by_task(kind: str, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"labels of task 't': .*{message}"):
        task_of(kind).loss(torch.zeros(2, KIND_OUTPUTS[kind]), labels)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 1), r"expected shape \[2\], found \[2, 1\]"),
        (torch.ones(3), r"expected shape \[2\], found \[3\]"),
        ([1.0, 1.0], "expected shape .* found list"),
        (torch.tensor([1.0, -0.5]), "expected finite weights of at least 0, found -0.5 to 1.0"),
        (torch.tensor([1.0, NAN]), "expected finite weights"),
        (torch.tensor([1.0, math.inf]), "expected finite weights"),
    ],
)
def test_wrong_sample_weights_are_told_by_task(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"sample_weights of task 't': {message}"):
        Task("t", "binary").loss(torch.zeros(2, 1), torch.tensor([1.0, NAN]), weights)
    with pytest.raises(ValueError, match=r"space of task 't': expected a mask of shape \[2\]"):
        Task("t", "binary").loss(torch.zeros(2, 1), torch.ones(2), mask_B=torch.ones(2, 1, dtype=torch.bool))


WRONG_TASKS: list[tuple[dict[str, Any], str]] = [
    ({"name": "a b", "kind": "binary"}, "task name must be letters"),
    ({"name": "1a", "kind": "binary"}, "task name must be letters"),
    ({"name": "", "kind": "binary"}, "task name must be letters"),
    ({"name": "a.b", "kind": "binary"}, "task name must be letters"),
    ({"name": 3, "kind": "binary"}, "task name must be letters"),
    ({"name": "shared", "kind": "binary"}, "'shared' is taken"),
    ({"name": "type", "kind": "binary"}, "task name 'type' is taken: it is an attribute of torch.nn.ModuleDict"),
    ({"name": "class", "kind": "binary"}, "task name 'class' is taken: it is a Python keyword"),  # breaks torch.export
    ({"name": "items", "kind": "binary"}, "task name 'items' is taken"),
    ({"name": "a", "kind": "binary", "group": "values"}, "group 'values' is taken"),
    ({"name": "a", "kind": "binary", "group": 3}, "task 'a': group must be letters"),
    ({"name": "a", "kind": "ranking"}, "kind must be one of binary, multiclass"),
    ({"name": "a", "kind": "binary", "num_outputs": 2}, r"num_outputs of a binary task must be in \[1, 1\], found 2"),
    ({"name": "a", "kind": "multiclass"}, r"num_outputs of a multiclass task must be in \[2, 1000000\], found 1"),
    ({"name": "a", "kind": "regression", "num_outputs": 0}, "num_outputs"),
    ({"name": "a", "kind": "regression", "num_outputs": 1.0}, "num_outputs must be an integer, found 1.0"),
    ({"name": "a", "kind": "regression", "num_outputs": True}, "num_outputs must be an integer"),
    ({"name": "a", "kind": "binary", "weight": -1}, "weight must be a number"),
    ({"name": "a", "kind": "binary", "weight": NAN}, "weight must be a number"),
    ({"name": "a", "kind": "binary", "weight": "1"}, "weight must be a number"),
    ({"name": "a", "kind": "binary", "metrics": ["rmse"]}, "a binary task has the metrics auc, group_auc"),
    ({"name": "a", "kind": "binary", "metrics": "auc"}, "metrics must be a list of names"),
    ({"name": "a", "kind": "binary", "metrics": 5}, "metrics must be a list of names"),
    ({"name": "a", "kind": "binary", "product_of": ["b"]}, "at least two tasks"),
    ({"name": "a", "kind": "regression", "product_of": ["b", "c"]}, "product_of needs kind 'binary'"),
    ({"name": "a", "kind": "binary", "space": ["b"]}, "space must be the name of a task"),
    ({"name": "a", "kind": "binary", "wieght": 2}, "unknown field 'wieght'; did you mean 'weight'"),
    ({"name": "a"}, "a task needs a 'kind'"),
    ({"kind": "binary"}, "a task needs a 'name'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_TASKS)
def test_wrong_tasks_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task.from_dict(fields)


def test_a_task_must_be_a_mapping() -> None:
    with pytest.raises(ValueError, match="a task must be a mapping"):
        Task.from_dict("ctr")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
)
FIELDS = st.sampled_from(["name", "kind", "num_outputs", "weight", "group", "metrics", "space", "product_of", "other"])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(FIELDS, JSON), st.booleans())
def test_any_json_gives_a_task_or_a_value_error(fields: dict[str, Any], valid_base: bool) -> None:
    base = {"name": "a", "kind": "regression"} if valid_base else {}
    try:
        task = Task.from_dict({**fields, **base})
        parse_tasks([task])
    except ValueError:
        return
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_every_field_survives_json() -> None:
    task = Task("a", "binary", weight=0.5, group="g", metrics=("f1", "auc"), space="b", product_of=("b", "c"))
    fields = json.loads(json.dumps(task.to_dict()))
    assert "num_outputs" not in fields  # only what differs from the defaults
    assert Task.from_dict(fields) == task
    assert Task.from_dict(Task("m", "multiclass", 7).to_dict()) == Task("m", "multiclass", 7)


def test_metrics_are_known_and_defaults_allowed() -> None:
    for kind, spec in KINDS.items():
        assert set(spec.metrics) <= set(spec.allowed_metrics) <= set(METRICS)
        assert Task("t", kind, num_outputs=spec.outputs[0]).reported_metrics == spec.metrics
    assert Task("a", "binary", metrics=("f1",)).reported_metrics == ("f1",)


def b(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "kind": "binary", **fields}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([b("a"), b("a")], "task 'a' is declared twice"),
        ([b("a", space="z")], "space must name another binary task, found 'z'"),
        ([b("a", space="a")], "space must name another binary task, found 'a'"),
        ([b("a", space="r"), {"name": "r", "kind": "regression"}], "space must name another binary task"),
        ([b("a", product_of=["b", "z"]), b("b")], "found 'z'"),
        ([b("a", product_of=["a", "b"]), b("b")], "found 'a'"),
        ([b("a", product_of=["b", "c"]), b("b"), b("c"), b("d", product_of=["a", "b"])], "with a tower, found 'a'"),
    ],
)
def test_references_between_tasks(tasks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tasks(tasks)


def test_check_task_names() -> None:
    known = ["c", "a", "b"]
    assert check_task_names(None, known) == known
    assert check_task_names("a", known) == ["a"]
    assert check_task_names(["b", "c"], known) == ["c", "b"]  # in the known order
    with pytest.raises(ValueError, match="at least one of c, a, b, found an empty list"):
        check_task_names([], known)
    with pytest.raises(UnknownTaskError) as error:
        check_task_names(["a", "x"], known)
    assert isinstance(error.value, KeyError)
    assert str(error.value) == "unknown task 'x'; known tasks: c, a, b"
    assert error.value.unknown == ["x"]
