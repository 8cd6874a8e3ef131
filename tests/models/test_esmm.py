"""ESMM: equations 1 and 2 of Ma et al. 2018 (SIGIR), and the product of probabilities taken between logits."""

import math
from fractions import Fraction

import pytest
import torch
from by_hand import check_gradients, close, mlp, model_of, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_mtl.models import REGISTRY
from moe_mtl.models._tabular import TabularModel, product_logit
from moe_mtl.tasks import Task


def exact_logit(*logits: float) -> float:
    """log(p / (1 - p)) of p = prod sigma(z), by 1 / p - 1 = prod(1 + e^-z) - 1 in exact fractions."""
    odds = Fraction(1)
    for z in logits:
        odds *= 1 + Fraction(math.exp(-z))
    odds -= 1
    return -(math.log(odds.numerator) - math.log(odds.denominator))


EXTREME = [-80.0, -30.0, -5.0, -1e-3, 0.0, 2.0, 17.0, 40.0, 80.0]


@pytest.mark.parametrize("a", EXTREME)
@pytest.mark.parametrize("b", EXTREME)
def test_product_logit_is_exact_to_rounding_in_float32_and_float64(a: float, b: float) -> None:
    expected = exact_logit(a, b)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        got = product_logit([torch.tensor([[a]], dtype=dtype), torch.tensor([[b]], dtype=dtype)])
        assert got.dtype == dtype
        rounding = exact_logit(float(torch.tensor(a, dtype=dtype)), float(torch.tensor(b, dtype=dtype)))
        assert got.item() == pytest.approx(rounding, rel=tolerance, abs=tolerance)
        assert rounding == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("a", EXTREME)
@pytest.mark.parametrize("b", EXTREME)
def test_product_logit_in_bfloat16(a: float, b: float) -> None:
    a_16, b_16 = torch.tensor([[a]], dtype=torch.bfloat16), torch.tensor([[b]], dtype=torch.bfloat16)
    got = product_logit([a_16, b_16])
    assert got.dtype == torch.bfloat16
    assert got.item() == pytest.approx(exact_logit(a_16.item(), b_16.item()), rel=2**-8, abs=2**-8)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=4))
def test_product_of_any_number_of_factors(logits: list[float]) -> None:
    tensors = [torch.tensor([[z]], dtype=torch.float64, requires_grad=True) for z in logits]
    product = product_logit(tensors)
    assert product.item() == pytest.approx(exact_logit(*logits), rel=1e-9, abs=1e-9)
    assert product.item() <= min(logits) + 1e-9  # a product is less probable than any factor
    product.backward()
    for z, tensor in zip(logits, tensors, strict=True):
        # d logit(p) / dz = (1 - sigma(z)) / (1 - p): in [0, 1]
        assert -1e-9 <= tensor.grad.item() <= 1 + 1e-9
        assert math.isfinite(z)


@pytest.mark.parametrize("a", [-80.0, 80.0])
@pytest.mark.parametrize("b", [-80.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_through_the_product_stays_finite(a: float, b: float, dtype: torch.dtype) -> None:
    """log(pCTR * pCVR) in probabilities is log(0), or 1 - 1, out here."""
    logits = [torch.full((2, 1), z, dtype=dtype, requires_grad=True) for z in (a, b)]
    loss = Task("ctcvr", "binary").loss(product_logit(logits), torch.tensor([0.0, 1.0]))
    loss.backward()
    product = exact_logit(a, b)
    expected = (max(product, 0) + max(-product, 0)) / 2 + math.log1p(math.exp(-abs(product)))
    assert loss.item() == pytest.approx(expected, rel=0.01 if dtype == torch.bfloat16 else 1e-5)
    assert all(bool(torch.isfinite(z.grad).all()) for z in logits)


def esmm() -> torch.nn.Module:
    return model_of("esmm", tower_dims=[5, 4])


def test_equations() -> None:
    """pCTCVR = pCTR pCVR; L = BCE(click, pCTR) + BCE(click and buy, pCTCVR) over all impressions."""
    model, x = esmm(), rows()
    assert model.tasks == ["ctr", "cvr", "ctcvr"]
    state = model.state_dict()
    click, buy = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    labels = {
        "ctr": torch.tensor(click, dtype=torch.float64),
        "cvr": torch.tensor(buy, dtype=torch.float64),
        "ctcvr": torch.tensor(buy, dtype=torch.float64),
    }
    out = model(numeric=x, labels=labels)
    loss = clicked = 0.0
    for b, row in enumerate(x):
        p_click, p_buy = (torch.sigmoid(mlp(state, f"towers.{task}", row)).item() for task in ("ctr", "cvr"))
        close(out.logits["ctr"][b], mlp(state, "towers.ctr", row))
        p = p_click * p_buy
        assert torch.sigmoid(out.logits["ctcvr"][b]).item() == pytest.approx(p, rel=1e-12)
        loss -= math.log(p_click if click[b] else 1 - p_click) / 4
        loss -= math.log(p if buy[b] else 1 - p) / 4
        if click[b]:
            clicked -= math.log(p_buy if buy[b] else 1 - p_buy) / 3
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert out.task_losses["cvr"].item() == pytest.approx(
        clicked, rel=1e-12
    )  # watched, on clicks only, but not trained
    out.loss.backward()
    assert model.towers["cvr"].output.weight.grad.abs().max() > 1e-4  # through the product


def test_conversion_is_trained_by_the_product_alone() -> None:
    model, x = esmm(), rows()
    out = model(numeric=x, labels={"ctr": torch.ones(4).double(), "cvr": torch.ones(4).double()})
    out.loss.backward()
    assert bool((model.towers["cvr"].output.weight.grad == 0).all())


def test_gradients() -> None:
    model = model_of("esmm", tower_dims=[3])
    labels = {"ctr": torch.tensor([1.0, 0, 1]).double(), "ctcvr": torch.tensor([1.0, 0, float("nan")]).double()}
    check_gradients(model.train(), labels)


@pytest.mark.parametrize(
    ("task", "towers"),
    [("ctr", {"ctr"}), ("cvr", {"cvr"}), ("ctcvr", {"ctr", "cvr"}), (["cvr", "ctr"], {"ctr", "cvr"})],
)
def test_extracted_towers(task: str | list[str], towers: set[str]) -> None:
    model, x = esmm(), rows()
    small = model.extract_task(task)
    assert set(small.towers) == towers
    for name in [task] if isinstance(task, str) else task:
        assert torch.equal(small(numeric=x).logits[name], model(numeric=x).logits[name])


def test_product_combines_with_any_trunk() -> None:
    tasks = REGISTRY["esmm"].config_class().tasks
    for model_type in (name for name, model in REGISTRY.items() if issubclass(model, TabularModel)):
        logits = model_of(model_type, tasks=tasks)(numeric=rows()).logits
        product = torch.sigmoid(logits["ctr"]) * torch.sigmoid(logits["cvr"])
        torch.testing.assert_close(torch.sigmoid(logits["ctcvr"]), product)
