"""The mixture of attention heads held to its equation, in float64."""

import math

import pytest
import torch
from torch import Tensor

from moe_mtl.layers.attention_experts import HeadExperts, SparseAttention
from moe_mtl.layers.moe import TaskRouter

T, B, L, D, E, K, H = 2, 3, 5, 8, 6, 3, 4
TASKS = ["edges", "depth"]


def layer_of(kept: list[int] | None = None) -> SparseAttention:
    router = TaskRouter(D, E, K, TASKS, kept=kept)
    layer = SparseAttention("blocks.0", router, HeadExperts(len(kept or range(E)), D, H), D, H, (1, L - 1))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum()


def chosen(x_D: Tensor, task: str, layer: SparseAttention) -> tuple[Tensor, list[int]]:
    p_E = softmax(layer.router.gates[task] @ x_D)
    return p_E, sorted(range(E), key=lambda e: -p_E[e].item())[:K]


def reference(x_LD: Tensor, task: str, layer: SparseAttention) -> Tensor:
    key, value = layer.kv.weight[:H], layer.kv.weight[H:]
    out = []
    for x_D in x_LD:
        p_E, experts = chosen(x_D, task, layer)
        y_D = torch.zeros(D, dtype=torch.float64)
        for e in experts:
            q_H = layer.experts.w_query[e] @ x_D
            a_L = softmax(torch.stack([q_H @ (key @ other_D) / math.sqrt(H) for other_D in x_LD]))
            o_H = sum(a * (value @ other_D) for a, other_D in zip(a_L, x_LD, strict=True))
            y_D = y_D + p_E[e] * (layer.experts.w_out[e] @ o_H)
        out.append(y_D)
    return torch.stack(out)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", ["torch", "grouped"])
def test_mixture_of_heads_is_the_papers_equation(backend: str, shared: bool) -> None:
    """Chosen heads' queries, one key and value for all, outputs weighted by the softmax over all, not renormalised."""
    layer = layer_of()
    layer.experts.backend = backend
    x_TBLD = tokens(1 if shared else T, B, L, D).requires_grad_()
    found = layer(x_TBLD, TASKS, None, True)
    expected = torch.stack(
        [
            torch.stack([reference(x_TBLD[0 if shared else t, b], task, layer) for b in range(B)])
            for t, task in enumerate(TASKS)
        ]
    )
    torch.testing.assert_close(found.hidden, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found.hidden.square().sum(), [x_TBLD, *layer.parameters()], retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), [x_TBLD, *layer.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    record = found.routing[0]
    for t, task in enumerate(TASKS):
        p_E, experts = chosen(x_TBLD[0 if shared else t, 1, 2], task, layer)
        assert record.indices[task][L + 2].tolist() == experts
        torch.testing.assert_close(record.weights[task][L + 2], p_E.detach())


def test_one_task_is_the_row_of_all() -> None:
    layer = layer_of()
    x_TBLD = tokens(T, B, L, D)
    whole = layer(x_TBLD, TASKS, None, False).hidden
    for t, task in enumerate(TASKS):
        torch.testing.assert_close(layer(x_TBLD[t : t + 1], [task], None, False).hidden[0], whole[t])


def test_images_do_not_attend_to_each_other() -> None:
    layer = layer_of()
    x_TBLD = tokens(T, B, L, D)
    whole = layer(x_TBLD, TASKS, None, False).hidden
    other = x_TBLD.clone()
    other[:, 1] = tokens(T, L, D, seed=5)
    found = layer(other, TASKS, None, False).hidden
    torch.testing.assert_close(found[:, [0, 2]], whole[:, [0, 2]])
    assert not torch.allclose(found[:, 1], whole[:, 1])


def test_mod_squad_experts_keep_the_models_dtype() -> None:
    """The official code casts experts to float16 whatever the model is."""
    layer = layer_of()
    x_TBLD = tokens(1, B, L, D)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert layer.to(dtype)(x_TBLD.to(dtype), TASKS, None, False).hidden.dtype == dtype


def test_heads_that_are_left_out_stay_in_the_softmax() -> None:
    kept = [1, 2, 4, 5]
    layer, small = layer_of(), layer_of(kept)
    x_TBLD = tokens(1, B, L, D)
    x_TBLD[..., 0] = 1.0
    with torch.no_grad():
        layer.router.gates["depth"][[0, 3], 0] -= 8.0  # too unlikely to be chosen
        small.kv.weight.copy_(layer.kv.weight)
        for name, parameter in small.experts.named_parameters():
            parameter.copy_(layer.experts.get_parameter(name)[kept])
    small.router.load_state_dict(layer.router.state_dict())
    whole = layer(x_TBLD, ["depth"], None, True)
    assert set(whole.routing[0].indices["depth"].flatten().tolist()) <= set(kept)
    found = small(x_TBLD, ["depth"], None, True)
    torch.testing.assert_close(found.hidden, whole.hidden, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.routing[0].indices["depth"], whole.routing[0].indices["depth"])
