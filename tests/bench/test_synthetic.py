"""The synthetic study at toy size: its models, its batch of draws against one model alone, its figures."""

import json
import math

import pytest
import torch

from moe_mtl.bench import synthetic
from moe_mtl.bench.synthetic import Draws, Options, build, draw, run, train

TINY = Options(correlations=(1.0, 0.0), draws=2, learning_rates=(1e-3, 1e-2), epochs=1, batch_size=50, rows=100)


def test_models_have_the_papers_sizes_and_about_as_many_parameters():
    assert build("shared_bottom", 100).config.bottom_dims == [113]  # 112.55 in the paper's formula
    counts = {name: sum(p.numel() for p in build(name, 100).parameters()) for name in ("shared_bottom", "omoe", "mmoe")}
    assert counts["mmoe"] - counts["omoe"] == 100 * 8
    # What the gates add is all that differs by much.
    assert abs(counts["omoe"] - 100 * 8 - counts["shared_bottom"]) / counts["shared_bottom"] < 0.02


def test_all_layers_of_all_models_start_alike():
    torch.manual_seed(0)  # the least layers have eight weights: all of them small once in a few dozen runs
    for name in ("shared_bottom", "omoe", "mmoe"):
        for key, parameter in build(name, 100).named_parameters():
            if "bias" in key:
                assert not parameter.any(), key
            else:
                bound = (6 / sum(parameter.shape[-2:])) ** 0.5
                assert 0.5 * bound < float(parameter.detach().abs().max()) <= bound, key


def test_a_draw_keeps_its_inputs_and_sines_at_every_correlation():
    near, far = draw(1.0, range(2), TINY), draw(0.0, range(2), TINY)
    assert torch.equal(near.train[0], far.train[0])
    assert near.train[0].shape == (2, 100, 100)
    assert near.test[1].shape == (2, 1000, 2)
    assert torch.allclose(near.train[1][..., 0], far.train[1][..., 0])  # w1 does not depend on the correlation
    assert not torch.equal(near.train[0][0], near.train[0][1])


def test_a_frequency_makes_the_sines_bend_and_changes_nothing_else():
    few = {key: value for key, value in vars(TINY).items() if key not in ("scale", "frequency")} | {"scale": 1.0}
    flat, bent = (draw(0.5, range(2), Options(**few, frequency=frequency)) for frequency in (0.0, 3.0))
    assert torch.equal(flat.train[0], bent.train[0])
    (x, flat_y), (_, bent_y) = flat.test, bent.test
    centred = [y - y.mean(1, keepdim=True) for y in (flat_y, bent_y)]
    left = [y - x @ torch.linalg.lstsq(x, y).solution for y in centred]
    assert left[0].std() < 0.15  # the noise
    assert left[1].std() > 1


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("name", ["shared_bottom", "omoe", "mmoe"])
def test_the_batch_of_models_learns_as_each_would_alone(name, schedule):
    draws = draw(0.5, range(2), TINY)
    together = train(name, draws, 1e-2, Options(**{**vars(TINY), "schedule": schedule}), seed=3)
    # The second draw alone, through the model's own forward; weights as the study drew them.
    torch.manual_seed(3)
    model = [build(name, 100) for _ in range(2)][1]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    order = torch.Generator().manual_seed(TINY.seed)
    x_BD, y_BT = (part[1] for part in draws.train)
    for step, index in enumerate(torch.randperm(100, generator=order).split(50)):
        if schedule == "cosine":
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.zero_grad()
        logits = model(numeric=x_BD[index]).logits
        (torch.cat(list(logits.values()), dim=1) - y_BT[index]).square().mean().backward()
        optimizer.step()
    x_BD, y_BT = (part[1] for part in draws.test)
    logits = model(numeric=x_BD).logits
    alone = (torch.cat(list(logits.values()), dim=1) - y_BT).square().mean().item()
    assert together["test"][1] == pytest.approx(alone, rel=1e-4)


def test_the_study_reports_paired_differences(tmp_path, capsys):
    result = synthetic.main(Options(**{**vars(TINY), "output": str(tmp_path)}))
    assert json.loads((tmp_path / "synthetic.json").read_text()) == result
    assert [row["correlation"] for row in result["correlations"]] == [1.0, 0.0]
    for row in result["correlations"]:
        assert set(row["models"]) == {"shared_bottom", "omoe", "mmoe"}
        own, theirs = row["models"]["shared_bottom"], row["models"]["mmoe"]
        gap = row["differences"]["shared_bottom - mmoe"]
        assert gap["mean"] == pytest.approx(own["test"]["mean"] - theirs["test"]["mean"])
        pairs = torch.tensor(own["by_draw"], dtype=torch.float64) - torch.tensor(theirs["by_draw"], dtype=torch.float64)
        assert gap["standard_error"] == pytest.approx(float(pairs.std() / 2**0.5), rel=1e-3)
        assert gap["log_ratio"]["mean"] == pytest.approx(
            float((torch.tensor(own["by_draw"]) / torch.tensor(theirs["by_draw"])).log().mean()), rel=1e-3, abs=1e-6
        )
        assert gap["worse_in"] == int((pairs > 0).sum())
    assert set(result["gaps"]) == {"shared_bottom", "omoe"}
    for name, gap in result["gaps"].items():
        near, far = (
            torch.tensor([row["models"][model]["by_draw"] for model in (name, "mmoe")], dtype=torch.float64)
            for row in result["correlations"]
        )
        growth = (far[0] - far[1]) - (near[0] - near[1])
        assert gap["difference"]["growth"]["mean"] == pytest.approx(float(growth.mean()))
        assert gap["difference"]["growth"]["standard_error"] == pytest.approx(float(growth.std() / 2**0.5))
        growth = (far[0] / far[1]).log() - (near[0] / near[1]).log()
        assert gap["log_ratio"]["growth"]["mean"] == pytest.approx(float(growth.mean()), abs=1e-9)
    printed = capsys.readouterr().out
    assert "shared_bottom - mmoe" in printed
    gap = result["gaps"]["omoe"]
    says = ["holds" if gap[part]["holds"] else "does not hold" for part in ("log_ratio", "difference")]
    assert f"the paper's ordering {says[0]} in the ratio, {says[1]} in the difference" in printed


def test_many_draws_train_group_by_group(monkeypatch):
    options = Options(**{**vars(TINY), "draws": 3, "models": ("mmoe",)})
    monkeypatch.setattr(synthetic, "DRAWS_AT_ONCE", 2)
    told = []
    found = run(options, told.append)["correlations"][0]
    losses = found["models"]["mmoe"]["by_draw"]
    assert len(losses) == 3
    assert [line for line in told if "of 3 draws" in line][:2] == [
        "correlation 1.0: 2 of 3 draws",
        "correlation 1.0: 3 of 3 draws",
    ]
    # Each group has data sets and weights of its own.
    rate = found["models"]["mmoe"]["learning_rate"]
    assert losses[:2] == train("mmoe", draw(1.0, [0, 1], options), rate, options, seed=0)["test"]
    assert losses[2:] == train("mmoe", draw(1.0, [2], options), rate, options, seed=2)["test"]


def test_the_learning_rate_is_chosen_on_validation_rows(monkeypatch):
    losses = {
        1e-3: {"train": 1.0, "validation": 1.0, "test": 5.0},
        1e-2: {"train": 0.0, "validation": 2.0, "test": 0.0},
    }
    empty = Draws(*[(torch.zeros(2, 1, 1), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]] * 2))] * 3)
    monkeypatch.setattr(synthetic, "draw", lambda correlation, seeds, options: empty)
    fake = lambda name, draws, rate, options, seed: {part: [loss, loss] for part, loss in losses[rate].items()}  # noqa: E731
    monkeypatch.setattr(synthetic, "train", fake)
    chosen = run(TINY)["correlations"][0]["models"]["mmoe"]
    assert (chosen["learning_rate"], chosen["test"]["mean"]) == (1e-3, 5.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("models", ("ple",)), ("draws", 1), ("learning_rates", (0.0,)), ("epochs", 0), ("schedule", "linear")],
)
def test_options_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Options(**{field: value})
