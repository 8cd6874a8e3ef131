"""Tiles of the kernels: the heuristic, the table of what was measured, and the measurement that writes it."""

import json

import pytest
import torch

pytest.importorskip("triton")

from moe_mtl.bench import tune
from moe_mtl.ops import expert_mlp, triton_configs
from moe_mtl.ops.triton_configs import Config, config_for, forced, heuristic, remember, rows_per_tile, shape_class

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("copies", "experts", "rows"), [(0, 8, 16), (8, 8, 16), (136, 8, 32), (800, 8, 128), (10**6, 8, 128), (40, 1, 64)]
)
def test_a_tile_is_as_high_as_an_average_expert_needs(copies: int, experts: int, rows: int) -> None:
    assert rows_per_tile(copies, experts) == rows


def test_the_table_comes_before_the_heuristic(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_configs, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "card")
    triton_configs._table.cache_clear()
    try:
        asked = ("linear", torch.bfloat16, 128, 2048, 768)
        usual = heuristic(*asked)
        assert config_for(*asked, torch.device("cuda")) == usual
        better = Config(128, 256, 64, 8, 4, 16)
        remember("card", {shape_class(*asked[1:]): {"linear": better}})
        remember("another card", {shape_class(*asked[1:]): {"outer": better}})
        assert config_for(*asked, torch.device("cuda")) == better
        assert config_for(*asked, CPU) == usual
        assert config_for("outer", *asked[1:], torch.device("cuda")) == heuristic("outer", *asked[1:])
        assert set(json.loads((tmp_path / "table.json").read_text())) == {"card", "another card"}
    finally:
        triton_configs._table.cache_clear()


def test_a_measurement_forces_tiles_and_learns_who_asked() -> None:
    with forced("linear", Config(16, 16, 16, 4, 2)) as asked:
        assert config_for("linear", torch.float32, 16, 304, 8, CPU).cols == 16
        assert config_for("outer", torch.float32, 16, 304, 8, CPU) == heuristic("outer", torch.float32, 16, 304, 8)
    assert asked == {shape_class(torch.float32, 16, 304, 8)}
    assert config_for("linear", torch.float32, 16, 304, 8, CPU).cols != 16


def test_tuning_finds_tiles_for_every_kernel_and_any_of_them_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "GROUPS", (4,))
    monkeypatch.setattr(tune, "TILES", dict.fromkeys(tune.TILES, ((16, 16, 4, 2), (32, 16, 4, 2))))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, up, down, weights = (
        torch.randn(*shape, generator=generator).to(device).requires_grad_()
        for shape in ((5, 8), (2, 24, 8), (2, 8, 12), (5, 1))
    )
    indices = torch.tensor([[0], [1], [1], [0], [1]], device=device)
    outputs: list[torch.Tensor] = []

    def call() -> None:
        out = expert_mlp(x, up, down, indices, weights, backend="triton")
        outputs.append(
            torch.cat([out.flatten(), *(g.flatten() for g in torch.autograd.grad(out.sum(), [x, up, down]))])
        )

    found = tune.best_tiles(call, (2, 5, 8, 12, 1), 1, lambda: None)
    assert {kernel for kernels in found.values() for kernel in kernels} == {
        "first_layer",
        "linear",
        "hidden_grad",
        "outer",
    }
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-5)
