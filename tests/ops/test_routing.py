"""Top-k routing against the equations, token by token; the plan against a sort in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_mtl.ops import make_plan, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(n: int = 9, e: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(
    row: list[float], k: int, scores: str, bias: list[float], renormalise: bool
) -> tuple[list[int], list[float]]:
    total = sum(math.exp(z) for z in row)
    of = {
        "softmax": lambda z: math.exp(z) / total,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
        "softmax_selected": lambda z: z,
    }[scores]
    found = [of(z) for z in row]
    chosen = sorted(range(len(row)), key=lambda e: (-(found[e] + bias[e]), e))[:k]
    weights = [found[e] for e in chosen]
    if scores == "softmax_selected":
        weights = [math.exp(w) for w in weights]
    if renormalise or scores == "softmax_selected":
        weights = [w / sum(weights) for w in weights]
    return chosen, weights


@pytest.mark.parametrize("scores", ["softmax", "softmax_selected", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_route(scores: str, renormalise: bool, k: int, biased: bool) -> None:
    x = logits()
    bias = logits(1, seed=5)[0] * 3 if biased else torch.zeros(7, dtype=torch.float64)
    indices, weights = route(x, k, scores=scores, bias_E=bias if biased else None, renormalise=renormalise)
    assert indices.dtype == torch.int64
    for n, row in enumerate(x.tolist()):
        chosen, expected = by_hand(row, k, scores, bias.tolist(), renormalise)
        assert indices[n].tolist() == chosen
        assert weights[n].tolist() == pytest.approx(expected, rel=1e-12)


def test_softmax_over_the_selected_is_the_renormalised_softmax_over_all() -> None:
    a, b = route(logits(), 3, renormalise=True), route(logits(), 3, scores="softmax_selected")
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-12, atol=0)


def test_ties_go_to_the_lower_number() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert route(torch.zeros(3, 64, dtype=dtype), 4)[0].tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("scores", ["softmax", "softmax_selected", "sigmoid"])
def test_the_gradient_of_the_weights(scores: str) -> None:
    x = logits(4).requires_grad_()
    torch.autograd.gradcheck(lambda z: route(z, 3, scores=scores, renormalise=True)[1], (x,))


def test_half_precision_scores_are_taken_in_float32() -> None:
    x = logits().bfloat16()
    assert torch.equal(route(x, 2)[1], route(x.float(), 2)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 1), r"logits: expected floats of shape \[N, E\], found torch.float32 of shape \[3\]"),
        ((torch.zeros(3, 4, dtype=torch.int64), 1), "logits: expected floats"),
        ((torch.zeros(3, 4), 5), "num_selected: expected 1 to 4, found 5"),
        ((torch.zeros(3, 4), 0), "num_selected: expected 1 to 4, found 0"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(*arguments)
    with pytest.raises(ValueError, match="scores: expected softmax"):
        route(torch.zeros(3, 4), 1, scores="tanh")
    with pytest.raises(ValueError, match=r"bias: expected shape \[4\], found \[3\]"):
        route(torch.zeros(3, 4), 1, bias_E=torch.zeros(3))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**30))
def test_plan(experts: int, k: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, experts + 1, (tokens, k), generator=generator)  # the last is nobody
    plan = make_plan(indices, experts)
    flat = indices.flatten().tolist()
    assert plan.order_S.tolist() == sorted(range(len(flat)), key=lambda s: flat[s])  # stable
    assert plan.position_S[plan.order_S].tolist() == list(range(len(flat)))
    assert plan.counts_E.tolist() == [flat.count(e) for e in range(experts)]
    assert plan.offsets.tolist() == [sum(f < e for f in flat) for e in range(experts + 1)]
    assert plan.ends_E.tolist() == plan.offsets.tolist()[1:]
    assert plan.tokens_S.tolist() == [s // k for s in plan.order_S.tolist()]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0, -1]]), r"numbers in \[0, 4\], found -1 to 0"),
        (torch.tensor([[0, 5]]), r"numbers in \[0, 4\], found 0 to 5"),
        (torch.tensor([0, 1]), r"expected int64 of shape \[N, K\]"),
        (torch.tensor([[0.0]]), "expected int64 of shape"),
    ],
)
def test_bad_indices(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(indices, 4)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 40), st.integers(0, 2**30))
def test_the_kernels_make_the_same_plan(experts: int, k: int, tokens: int, seed: int) -> None:
    pytest.importorskip("triton")
    indices = torch.randint(0, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    same_plan(indices, experts)


@pytest.mark.parametrize("experts", [3, 130])
def test_the_kernels_make_the_same_plan_of_several_blocks(experts: int) -> None:
    pytest.importorskip("triton")
    same_plan(torch.randint(0, experts + 1, (700, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE), experts)


def same_plan(indices: torch.Tensor, experts: int) -> None:
    expected, found = make_plan(indices, experts), make_plan(indices, experts, "triton")
    for name in ("indices_NK", "order_S", "position_S", "offsets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for rows in (16, 64):
        for a, b in zip(found.tiles(rows, "triton"), expected.tiles(rows), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 60), st.sampled_from([1, 4, 16]), st.integers(0, 2**30))
def test_tiles_hold_each_place_of_an_expert_once_and_no_other(
    experts: int, k: int, tokens: int, rows: int, seed: int
) -> None:
    indices = torch.randint(0, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(seed))
    plan = make_plan(indices, experts)
    found: list[tuple[int, int]] = []
    for expert, start in zip(*(t.tolist() for t in plan.tiles(rows)), strict=True):
        if expert < experts:
            found += [(expert, place) for place in range(start, min(start + rows, int(plan.offsets[expert + 1])))]
    offsets = plan.offsets.tolist()
    assert found == [(e, place) for e in range(experts) for place in range(offsets[e], offsets[e + 1])]
