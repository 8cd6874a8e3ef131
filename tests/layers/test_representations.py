"""SAK's paths, routers and mixtures held to their equations, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mtl.layers.representations import RepresentationDecoder, RepresentationRouter

B, D, C = 3, 6, 4
GRID = (2, 2)
TASKS, TEACHERS = ["edges", "depth"], ["dino", "sam"]


def decoder_of(noisy: bool = True) -> RepresentationDecoder:
    decoder = RepresentationDecoder([2, 3], D, 2, C, TEACHERS, TASKS, GRID, noisy, 1e-6).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return decoder


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def router_reference(router: RepresentationRouter, x_LD: Tensor, task: str) -> Tensor:
    first, norm, _, last = router.gates[task]
    rows = []
    for x_D in x_LD:
        h = linear(x_D, first)
        h = (h - h.mean()) / torch.sqrt(h.var(unbiased=False) + norm.eps) * norm.weight + norm.bias
        rows.append(linear(gelu(h), last)[: len(TEACHERS) + 1])
    w = (sum(rows) / len(rows)).exp()
    return w / w.sum()


@pytest.mark.parametrize("noisy", [True, False])
def test_the_decoder_is_the_equations(noisy: bool) -> None:
    decoder = decoder_of(noisy)
    hidden = [drawn(1, B, 1 + 4, D, seed=i).requires_grad_() for i in range(4)]
    found = decoder(hidden, TASKS, True)
    expected = []
    for task in TASKS:
        images = []
        for b in range(B):
            total = torch.zeros(4, C, dtype=torch.float64)
            for i, blocks in enumerate((2, 3)):
                told = [hidden[blocks][0, b]]
                for teacher in TEACHERS:
                    r, x_before = hidden[0][0, b], hidden[0][0, b]
                    for k in range(1, blocks + 1):
                        u = hidden[k][0, b] + (r - x_before)
                        adapter = decoder.adapters[teacher][k - 1]
                        r, x_before = u + adapter.scale * linear(gelu(linear(u, adapter.down)), adapter.up), hidden[k][0, b]  # noqa: E501 # fmt: skip
                    told.append(r)
                w = router_reference(decoder.routers[i], hidden[blocks][0, b], task)
                torch.testing.assert_close(found.routing[i].weights[task][b], w.detach())
                mixed = sum(w[m] * told[m] for m in range(3))
                total = total + linear(mixed[1:], decoder.projections[i][task])
            images.append(total)
        expected.append(torch.stack(images))
    expected = torch.stack(expected)
    torch.testing.assert_close(found.hidden, expected, rtol=1e-10, atol=1e-10)
    leaves = [*hidden[1:], *decoder.parameters()]
    ours = torch.autograd.grad(found.hidden.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert found.routing[0].experts["edges"] == ("stem", "dino", "sam")
    assert not found.routing[0].indices


def test_noise_is_in_training_alone_and_as_wide_as_the_router_says() -> None:
    router = decoder_of().routers[0]
    x_BLD = drawn(B, 4, D)
    assert torch.equal(router(x_BLD, "edges"), router(x_BLD, "edges"))
    torch.manual_seed(0)
    drawn_logits = torch.stack([router.train()(x_BLD, "edges").log() for _ in range(4000)])
    spread = (drawn_logits[..., 0] - drawn_logits[..., 1]).std(0)
    width = F.softplus(router.gates["edges"](x_BLD).mean(1)[:, 3:]) + 0.01
    torch.testing.assert_close(spread, width[:, :2].square().sum(-1).sqrt(), rtol=0.05, atol=0)


def test_weights_are_one_set_per_image() -> None:
    record = decoder_of()([drawn(1, B, 5, D, seed=i) for i in range(4)], ["depth"], True).routing[1]
    assert record.weights["depth"].shape == (B, 3)
    torch.testing.assert_close(record.weights["depth"].sum(1), torch.ones(B, dtype=torch.float64))
