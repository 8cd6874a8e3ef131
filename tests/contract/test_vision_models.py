"""What holds for every model for images: answers, gradients, files, precision, routing, bad inputs."""

import copy
import math
from pathlib import Path

import pytest
import torch
import vision_zoo as zoo
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from zoo import own_fields

from moe_mtl import AutoModelForMultiTask
from moe_mtl.models import REGISTRY
from moe_mtl.outputs import MultiTaskOutput

all_variants = pytest.mark.parametrize("variant", zoo.VARIANTS)
all_types = pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert list(got) == list(expected)
    for task, logits in got.items():
        torch.testing.assert_close(
            logits, expected[task], rtol=tolerance, atol=tolerance, msg=lambda m, t=task: f"{t}: {m}"
        )


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for task, logits in got.items():
        assert torch.equal(logits, expected[task]), task


# --- answers and gradients --------------------------------------------------------------------------------------------


@all_variants
def test_forward_and_backward(variant: str) -> None:
    model = zoo.variant_of(variant).train()
    config = model.config
    out = model(**zoo.inputs_of(config), labels=zoo.labels_of(config))
    assert isinstance(out, MultiTaskOutput)
    assert list(out.logits) == zoo.TASK_NAMES == list(out.task_losses)
    for task in config.parsed_tasks:
        shape = (4, task.num_outputs, *zoo.SIZE) if task.dense else (4, task.num_outputs)
        assert out.logits[task.name].shape == shape
    assert out.last_hidden_state.shape[:2] == (4, len(zoo.TASKS))
    expected = sum(task.get("weight", 1.0) * out.task_losses[task["name"]] for task in zoo.TASKS)
    if out.auxiliary_loss is not None:
        expected = expected + out.auxiliary_loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


@all_variants
def test_no_label_at_all_gives_no_gradient(variant: str) -> None:
    model = zoo.variant_of(variant)  # evaluation: no balance
    labels = zoo.labels_of(model.config)
    for task in model.config.parsed_tasks:
        labels[task.name].fill_(task.missing)
    out = model(**zoo.inputs_of(model.config), labels=labels)
    assert out.loss.item() == 0
    out.loss.backward()
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


@all_types
def test_only_the_labelled_tasks_count(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    assert model(**inputs).loss is None
    assert model(**inputs).task_losses is None
    assert list(model(**inputs, labels={"depth": labels["depth"]}).task_losses) == ["depth"]
    both = model(**inputs, labels=labels, tasks=["scene", "edges"])
    assert list(both.task_losses) == ["edges", "scene"]
    torch.testing.assert_close(both.loss, 50 * both.task_losses["edges"] + 0.5 * both.task_losses["scene"])
    weighted = model(**inputs, labels=labels, sample_weights={"tilt": torch.arange(4.0)}, tasks="tilt")
    plain = (weighted.logits["tilt"][:3, 0] - labels["tilt"][:3]) ** 2
    torch.testing.assert_close(weighted.loss, (plain * torch.arange(3.0)).sum() / 3)


@all_variants
def test_images_do_not_see_each_other_in_evaluation(variant: str) -> None:
    model = zoo.variant_of(variant)
    (pixels,) = zoo.inputs_of(model.config, rows=5).values()
    whole = model(pixels).logits
    order = torch.tensor([3, 0, 4, 1, 2])
    close(model(pixels[order]).logits, {t: z[order] for t, z in whole.items()})
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        close(model(pixels[rows]).logits, {t: z[rows] for t, z in whole.items()})
    other = pixels.clone()
    other[2] += 1.0
    changed = model(other).logits
    for task, logits in whole.items():
        torch.testing.assert_close(changed[task][[0, 1, 3, 4]], logits[[0, 1, 3, 4]], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(changed[task][2], logits[2])


@all_variants
def test_training_answers_like_evaluation_but_for_what_is_random(variant: str) -> None:
    model = zoo.variant_of(variant, **zoo.QUIET)
    inputs = zoo.inputs_of(model.config)
    whole = model(**inputs)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    trained = model(**inputs)
    close(trained.logits, whole.logits)
    torch.testing.assert_close(trained.last_hidden_state, whole.last_hidden_state, rtol=1e-4, atol=1e-4)
    close(model(**inputs, tasks=["edges", "tilt"]).logits, {task: whole.logits[task] for task in ("edges", "tilt")})


@all_variants
def test_seeds_decide_everything(variant: str) -> None:
    def losses(seed: int) -> list[float]:
        model = zoo.variant_of(variant, seed=seed).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        out = []
        for _ in range(3):
            loss = model(**zoo.inputs_of(model.config), labels=zoo.labels_of(model.config)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    first = losses(3)
    assert losses(3) == first
    assert losses(4) != first


@all_variants
def test_checkpointing_changes_neither_gradient_nor_state(variant: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = zoo.variant_of(variant).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        pixels = zoo.inputs_of(model.config)["pixel_values"].double()
        model(pixels, labels=zoo.labels_of(model.config)).loss.backward()
        found.append((dict(model.named_buffers()), {name: p.grad for name, p in model.named_parameters()}))
    for name, buffer in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], buffer, msg=name)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-8, atol=1e-8, msg=name)


@all_types
def test_every_kind_of_task_can_be_learnt(model_type: str) -> None:
    """The loss of a handful of images falls far below that of a guess: no part is cut off from its gradient."""
    tasks = [zoo.TASKS[i] for i in (0, 4, 5)]
    model = zoo.model_of(model_type, tasks=tasks, initializer_range=0.1, layer_scale=None, **zoo.QUIET).train()
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    coarse = nn.functional.interpolate(inputs["pixel_values"].mean(1, keepdim=True), scale_factor=0.25, mode="area")
    coarse = nn.functional.interpolate(coarse, scale_factor=4.0)[:, 0]
    labels["semseg"] = (coarse > 0).long() + 2 * (coarse > 0.2).long()  # can be told, unlike random pixels
    labels["depth"] = coarse
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    enough = {task: 0.6 * loss.item() for task, loss in model(**inputs, labels=labels).task_losses.items()}
    for _ in range(150):
        losses = model(**inputs, labels=labels).task_losses
        if all(losses[task].item() < bound for task, bound in enough.items()):
            return
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    pytest.fail(f"after 150 steps {losses}, hoped for less than {enough}")


# --- files ------------------------------------------------------------------------------------------------------------


@all_variants
def test_saved_and_loaded_it_is_the_same(variant: str, tmp_path: Path) -> None:
    model = zoo.variant_of(variant)
    inputs = zoo.inputs_of(model.config)
    model.config.use_cache = False  # transformers' Trainer writes this into any config
    model.save_pretrained(tmp_path)
    again = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert type(again) is type(model) is type(AutoModel.from_pretrained(tmp_path))
    assert not again.training
    assert again.tasks == zoo.TASK_NAMES  # JSON sorts a dict, not a list
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    same(again(**inputs).logits, model(**inputs).logits)


@all_types
def test_saved_in_shards(model_type: str, tmp_path: Path) -> None:
    model = zoo.model_of(model_type)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = zoo.inputs_of(model.config)
    same(type(model).from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)
    alone = type(model).from_pretrained(tmp_path, tasks="scene")(**inputs).logits
    close(alone, {"scene": model(**inputs).logits["scene"]})


@all_types
def test_every_field_survives_its_file(model_type: str, tmp_path: Path) -> None:
    config = zoo.config_of(model_type)
    default = type(config)()
    at_default = {f.name for f in own_fields(type(config)) if getattr(config, f.name) == getattr(default, f.name)}
    assert at_default <= {"gate", *zoo.WRITTEN_BY_THE_LIBRARY}, at_default
    config.save_pretrained(tmp_path)
    for again in (type(config).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is type(config)
        for field in own_fields(type(config)):
            assert getattr(again, field.name) == getattr(config, field.name), field.name


@all_types
def test_weights_that_are_not_given_start_anew(model_type: str) -> None:
    config = zoo.config_of(model_type)
    model = REGISTRY[model_type].from_pretrained(None, config=config, state_dict={})
    for name, tensor in model.state_dict().items():
        assert bool(torch.isfinite(tensor.float()).all()), name
        assert tensor.abs().max() < 10, name
    fresh = REGISTRY[model_type](config)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@all_types
def test_copies_are_equal_and_apart(model_type: str) -> None:
    model = zoo.model_of(model_type)
    other = copy.deepcopy(model)
    inputs = zoo.inputs_of(model.config)
    same(other(**inputs).logits, model(**inputs).logits)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not torch.equal(other(**inputs).logits["scene"], model(**inputs).logits["scene"])


# --- precision --------------------------------------------------------------------------------------------------------


@all_variants
def test_half_precision(variant: str, tmp_path: Path) -> None:
    """A token whose experts are nearly even may choose others: most answers are near, not all."""
    model = zoo.variant_of(variant)
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    whole = model(**inputs).logits
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = half(**inputs, labels=labels)
    for task, logits in out.logits.items():
        assert logits.dtype == torch.bfloat16
        off = (logits.float() - whole[task]).abs().median()
        assert off < 0.1 * whole[task].abs().max(), (task, off)
    assert out.loss.dtype == torch.float32
    half.train()(**inputs, labels=labels).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in half.parameters())


@all_variants
def test_autocast(variant: str) -> None:
    model = zoo.variant_of(variant).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**zoo.inputs_of(model.config), labels=zoo.labels_of(model.config)).loss
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# --- routing ----------------------------------------------------------------------------------------------------------


@all_variants
def test_routing_record(variant: str) -> None:
    model = zoo.variant_of(variant)
    inputs = zoo.inputs_of(model.config)
    assert model(**inputs).routing is None
    out = model(**inputs, output_routing=True)
    same(out.logits, model(**inputs).logits)
    routers = [name for name, _ in model.named_parameters() if name.endswith(".gate") or ".gates." in name]
    assert bool(out.routing) == bool(routers)
    assert len({record.layer for record in out.routing}) == len(out.routing)
    patches = model.config.grid[0] * model.config.grid[1]
    for record in out.routing:
        assert list(record.weights) == list(record.experts) == zoo.TASK_NAMES
        for task, weights in record.weights.items():
            names = record.experts[task]
            assert len(set(names)) == len(names) == weights.shape[1]
            rows = 4 if record.grid is None else 4 * patches
            assert len(weights) in (rows, rows + 4 * model.config.cls_token)
            torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
            assert bool((weights >= 0).all())
            assert -1e-6 <= record.entropy()[task].item() <= math.log(len(names)) + 1e-5
            torch.testing.assert_close(record.utilisation()[task].sum(), torch.tensor(1.0))
            if record.indices:
                chosen = record.indices[task]
                assert len(chosen) == len(weights)
                least = weights.gather(1, chosen).min(1).values
                rest = weights.scatter(1, chosen, 0.0).max(1).values
                assert bool((least >= rest).all())
                assert all(len(set(row)) == len(row) for row in chosen.tolist())
        assert record.grid in (None, model.config.grid)
        assert not any(w.requires_grad for w in record.weights.values())


@all_types
def test_routing_of_one_task_is_that_of_all(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs = zoo.inputs_of(model.config)
    whole = model(**inputs, output_routing=True).routing
    alone = model(**inputs, output_routing=True, tasks="depth").routing
    for record, small in zip(whole, alone, strict=True):
        assert list(small.weights) == ["depth"]
        torch.testing.assert_close(small.weights["depth"], record.weights["depth"], rtol=1e-4, atol=1e-5)
        assert small.experts["depth"] == record.experts["depth"]
        if record.indices:
            assert torch.equal(small.indices["depth"], record.indices["depth"])


@all_types
def test_evaluation_leaves_the_model_alone(model_type: str) -> None:
    model = zoo.model_of(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**zoo.inputs_of(model.config), output_routing=True, labels=zoo.labels_of(model.config))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- bad inputs -------------------------------------------------------------------------------------------------------


@all_types
def test_bad_pixels_and_labels(model_type: str) -> None:
    model = zoo.model_of(model_type)
    (pixels,) = zoo.inputs_of(model.config).values()
    labels = zoo.labels_of(model.config)
    holed = pixels.clone()
    holed[1, 1, 2, 3] = math.nan
    for wrong, message in (
        (pixels[..., :-1], r"expected shape \[B, 2, 16, 24\], found \[4, 2, 16, 23\]"),
        (pixels[:, :1], r"expected shape \[B, 2, 16, 24\], found \[4, 1, 16, 24\]"),
        (pixels[0], r"found \[2, 16, 24\]"),
        (pixels[:0], "expected at least one image"),
        (pixels.to(torch.uint8), "expected floats .* found torch.uint8"),
        (holed, "expected finite numbers, found NaN or infinity"),
        (pixels.tolist(), "found list"),
    ):
        with pytest.raises(ValueError, match=f"pixel_values: {message}|pixel_values: .*{message}"):
            model(wrong)
    for wrong, message in (
        ({"depth": labels["depth"][:, :-1]}, r"labels of task 'depth': expected shape \[4, 16, 24\]"),
        ({"semseg": labels["depth"]}, "labels of task 'semseg': expected torch.int64"),
        ({"normals": labels["depth"]}, "labels of task 'normals': expected shape"),
        ({"scene": torch.full((4,), 3)}, "labels of task 'scene': expected class ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model(pixels, labels=wrong)
    with pytest.raises(ValueError, match="labels: expected a mapping from task to tensor, found Tensor"):
        model(pixels, labels=labels["depth"])
