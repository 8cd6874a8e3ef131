"""One task alone, for every model for images: the same answer, from what the task needs and nothing else."""

import copy
from pathlib import Path

import pytest
import torch
import vision_zoo as zoo
from torch import Tensor, nn

from moe_mtl.checkpoint import Checkpoint
from moe_mtl.models import AutoModelForMultiTask, MultiTaskModel, _base
from moe_mtl.tasks import UnknownTaskError

all_variants = pytest.mark.parametrize("variant", zoo.VARIANTS)
all_types = pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if got.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def poison_the_rest(model: MultiTaskModel, small: MultiTaskModel) -> int:
    """Sets to NaN everything that the small model does not hold; returns how many tensors that were."""
    kept = small.state_dict()
    rest = [t for name, t in model.state_dict().items() if name not in kept and t.is_floating_point()]
    for tensor in rest:
        tensor.fill_(float("nan"))
    return len(rest)


@all_variants
def test_every_task_alone_answers_like_the_full_model(variant: str) -> None:
    model = zoo.variant_of(variant)
    pixels = zoo.inputs_of(model.config, rows=3)["pixel_values"]
    whole = model(pixels).logits
    whole_precise = copy.deepcopy(model).double()(pixels.double()).logits
    for task in zoo.TASK_NAMES:
        small = model.extract_task(task)
        assert type(small) is type(model)
        assert small.tasks == [task]
        assert not small.training
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        close(small(pixels).logits[task], whole[task])
        alone = model(pixels, tasks=[task]).logits
        assert list(alone) == [task]
        assert torch.equal(alone[task], small(pixels).logits[task]), task

        poisoned = copy.deepcopy(model)
        assert poison_the_rest(poisoned, small) > 0
        assert torch.equal(poisoned(pixels, tasks=task).logits[task], alone[task]), task

        close(small.double()(pixels.double()).logits[task], whole_precise[task])


@all_types
def test_a_double_model_extracts_to_a_double_one(model_type: str) -> None:
    small = zoo.model_of(model_type).double().extract_task("scene")
    assert {p.dtype for p in small.parameters()} == {torch.float64}


@all_types
def test_one_task_runs_no_module_of_another(model_type: str) -> None:
    model = zoo.model_of(model_type)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, x, y, name=name: ran.append(name))
    model(**zoo.inputs_of(model.config), tasks=["edges"])
    others = set(zoo.TASK_NAMES) - {"edges"}
    assert any("edges" in name.split(".") for name in ran)
    assert not any(others & set(name.split(".")) for name in ran)


@all_types
def test_several_tasks_and_extraction_from_an_extraction(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs = zoo.inputs_of(model.config)
    whole = model(**inputs).logits
    pair = model.extract_task(["scene", "saliency"])
    assert pair.tasks == ["saliency", "scene"]  # order stays
    for task, logits in pair(**inputs).logits.items():
        close(logits, whole[task])
    once, twice = model.extract_task("scene"), pair.extract_task("scene")
    assert once.config.to_dict() == twice.config.to_dict()
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in once.state_dict().items())
    assert model.extract_task(zoo.TASK_NAMES).state_dict().keys() == model.state_dict().keys()


@all_variants
def test_reading_one_task_from_disk_reads_only_that(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.variant_of(variant)
    model.save_pretrained(tmp_path)
    inputs = zoo.inputs_of(model.config)
    checkpoints: list[Checkpoint] = []

    class Counted(Checkpoint):
        def __init__(self, folder: Path, **options: bool) -> None:
            super().__init__(folder, **options)
            checkpoints.append(self)

    monkeypatch.setattr(_base, "Checkpoint", Counted)
    type(model).from_pretrained(tmp_path)
    everything = checkpoints[-1].bytes_read
    assert everything == sum(t.nbytes for t in model.state_dict().values())
    for task in ("depth", "scene"):
        small = AutoModelForMultiTask.from_pretrained(tmp_path, tasks=[task])
        extracted = model.extract_task(task)
        assert small.state_dict().keys() == extracted.state_dict().keys()
        assert torch.equal(small(**inputs).logits[task], extracted(**inputs).logits[task])
        assert checkpoints[-1].bytes_read == sum(t.nbytes for t in small.state_dict().values()) < everything


@all_variants
def test_the_extracted_model_saves_loads_and_learns(variant: str, tmp_path: Path) -> None:
    model = zoo.variant_of(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    small = model.extract_task("normals")
    small.save_pretrained(tmp_path)
    again = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits["normals"], small(**inputs).logits["normals"])
    again.train()(**inputs, labels={"normals": labels["normals"]}).loss.backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    changed = [name for name, p in again.named_parameters() if not torch.equal(p, small.state_dict()[name])]
    assert any("heads.normals" in name for name in changed)
    assert any("blocks." in name for name in changed)
    for parameter in small.parameters():
        parameter.data.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # no memory is shared


@all_variants
def test_task_parameters_are_a_partition_by_who_uses_them(variant: str) -> None:
    model = zoo.variant_of(variant)
    owned = model.task_parameters()
    assert list(owned) == ["shared", *zoo.TASK_NAMES]
    everyone = [id(p) for group in owned.values() for p in group]
    assert sorted(everyone) == sorted(id(p) for p in model.parameters())
    inputs = zoo.inputs_of(model.config, rows=2)
    for task in ("edges", "scene"):
        assert owned[task]
        spoilt = copy.deepcopy(model)
        for parameter in spoilt.task_parameters()[task]:
            nn.init.constant_(parameter, float("nan"))
        rest = [name for name in zoo.TASK_NAMES if name != task]
        assert all(bool(z.isfinite().all()) for z in spoilt(**inputs, tasks=rest).logits.values())


@all_types
def test_unknown_tasks(model_type: str, tmp_path: Path) -> None:
    model = zoo.model_of(model_type, tasks=[{"name": "only", "kind": "depth"}])
    inputs = zoo.inputs_of(model.config)
    small = model.extract_task("only")
    assert small.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(small(**inputs).logits["only"], model(**inputs).logits["only"])
    model.save_pretrained(tmp_path)
    labels = {"only": torch.zeros(4, *zoo.SIZE)}
    for call in (
        lambda: model(**inputs, tasks=["onyl"]),
        lambda: model(**inputs, labels={"onyl": labels["only"]}),
        lambda: model(**inputs, labels=labels, sample_weights={"onyl": torch.ones(4)}),
        lambda: model.extract_task("onyl"),
        lambda: type(model).from_pretrained(tmp_path, tasks=["onyl"]),
    ):
        with pytest.raises(UnknownTaskError, match="unknown task 'onyl'; known tasks: only"):
            call()
    with pytest.raises(ValueError, match="at least one of only, found an empty list"):
        model(**inputs, tasks=[])
