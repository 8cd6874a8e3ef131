"""Saving over what stood there, loading with other weights, uploading: what a folder holds afterwards."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from transformers import AutoModel, AutoProcessor

from moe_mtl import AutoModelForMultiTask, TabularProcessor, hub
from moe_mtl.files import CheckpointError, UnsafeFileError
from moe_mtl.tasks import UnknownTaskError


def make(model_type: str = "mmoe", **fields: object):
    torch.manual_seed(0)
    config = zoo.config_of(model_type, **fields)
    return AutoModelForMultiTask.from_config(config).eval()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sizes", [("5GB", "4KB"), ("4KB", "5GB"), ("4KB", "2KB", "5GB", "4KB")])
def test_a_save_replaces_what_an_earlier_one_left(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    model = make()
    (tmp_path / "notes.txt").write_text("mine")
    for size in sizes:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model.save_pretrained(tmp_path, max_shard_size=size)
        hub.write_manifest(tmp_path)
        weights = {entry.name for entry in tmp_path.glob("*.safetensors*")}
        index = tmp_path / "model.safetensors.index.json"
        if size == "5GB":
            assert weights == {"model.safetensors"}
        else:  # the shards that the index names, at least two, and none of an earlier save
            shards = set(json.loads(index.read_text())["weight_map"].values())
            assert weights == shards | {index.name}
            assert len(shards) > 1
        assert same(AutoModelForMultiTask.from_pretrained(tmp_path).state_dict(), model.state_dict())
    model.save_pretrained(tmp_path)  # the manifest that stands there is written anew
    AutoModelForMultiTask.from_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with torch.no_grad():
        next(model.parameters()).add_(1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_file_is_no_folder_to_save_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="found a file"):
        make().save_pretrained(tmp_path / "file")


def test_weights_given_as_a_state_dict_are_held_to_the_same_checks(tmp_path: Path) -> None:
    model = make()
    state = model.state_dict()
    cls = type(model)
    assert same(cls.from_pretrained(None, config=model.config, state_dict=state).state_dict(), state)
    first, *rest = state
    with pytest.raises(CheckpointError, match=f"1 missing: {first}"):
        cls.from_pretrained(None, config=model.config, state_dict={name: state[name] for name in rest})
    with pytest.raises(CheckpointError, match="NaN or infinite values in"):
        cls.from_pretrained(None, config=model.config, state_dict=state | {rest[-1]: state[rest[-1]] * torch.nan})
    with pytest.raises(ValueError, match="both config and state_dict"):
        cls.from_pretrained(None)
    model.save_pretrained(tmp_path)
    learnt = dict(model.named_parameters())
    other = {name: tensor + 1 if name in learnt else tensor for name, tensor in state.items()}
    assert same(cls.from_pretrained(tmp_path, state_dict=other).state_dict(), other)


def test_ignored_mismatches_start_anew_and_nothing_else_is_let_through(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    wider = zoo.config_of("mmoe", tower_dims=[width + 1 for width in model.config.tower_dims])
    fresh = type(model).from_pretrained(tmp_path, config=wider, ignore_mismatched_sizes=True)
    old, new = model.state_dict(), fresh.state_dict()
    kept = [name for name in new if new[name].shape == old[name].shape]
    assert 0 < len(kept) < len(new)
    assert all(torch.equal(new[name], old[name]) for name in kept)
    assert all(tensor.isfinite().all() for tensor in new.values() if tensor.is_floating_point())
    with pytest.raises(ValueError, match="tasks: cannot go with ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, tasks=[model.tasks[0]], ignore_mismatched_sizes=True)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="NaN"):
        type(model).from_pretrained(tmp_path, config=wider, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("key", ["subfolder", "variant"])
def test_what_is_not_looked_at_is_refused(tmp_path: Path, key: str) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=key):
        type(model).from_pretrained(tmp_path, **{key: "fp16"})


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_a_config_cannot_ask_for_a_kernel(tmp_path: Path, key: str) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: "someone/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeFileError, match=key):
        AutoModelForMultiTask.from_pretrained(tmp_path)


def test_one_task_of_a_folder_with_a_manifest_reads_only_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("cgc")
    model.save_pretrained(tmp_path)
    hub.write_manifest(tmp_path)
    hashed = []
    monkeypatch.setattr(hub, "file_sha256", lambda path, real=hub.file_sha256: hashed.append(path.name) or real(path))
    AutoModelForMultiTask.from_pretrained(tmp_path, tasks=[model.tasks[0]])
    assert hashed == ["config.json"]
    with pytest.raises(UnknownTaskError):
        AutoModelForMultiTask.from_pretrained(tmp_path, tasks=["nobody"])
    hashed.clear()
    AutoModelForMultiTask.from_pretrained(tmp_path)
    assert sorted(hashed) == ["config.json", "model.safetensors"]


def test_a_config_of_absurd_size_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    features = [{"name": "x", "kind": "numeric", "bins": list(range(1000))}]
    model = make(features=features, numeric_embedding="piecewise_linear", numeric_embedding_dim=2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "numeric_embedding_dim": 65_536,
        "features": features + [features[0] | {"name": f"y{i}"} for i in range(30)],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="of another shape"):  # 8 GB, were it built
        AutoModelForMultiTask.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


# --- uploading


class Api:
    """Takes what would go to the Hub."""

    def __init__(self, **kwargs: object):
        self.kwargs = kwargs

    def create_repo(self, repo_id: str, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: Path, **kwargs: object) -> SimpleNamespace:
        shutil.copytree(folder_path, UPLOADED["folder"])
        UPLOADED["arguments"] = kwargs
        return SimpleNamespace(commit_url="https://example.org/commit")


UPLOADED: dict = {}


@pytest.fixture
def uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    UPLOADED["folder"] = tmp_path / "uploaded"
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return UPLOADED["folder"]


def test_push_takes_the_processor_and_the_card_along(uploaded: Path) -> None:
    model = AutoModelForMultiTask.from_pretrained("mmoe-digits")
    assert model.push_to_hub("somebody/digits", private=True) == "https://example.org/commit"
    card = hub.zoo()["mmoe-digits"]
    for name in ("README.md", "results.json", "preprocessor_config.json", "recipe.resolved.yaml"):
        assert (uploaded / name).read_bytes() == (card / name).read_bytes(), name
    assert UPLOADED["arguments"]["repo_id"] == "somebody/digits"
    assert "*.md" in UPLOADED["arguments"]["allow_patterns"]
    assert same(AutoModelForMultiTask.from_pretrained(uploaded).state_dict(), model.state_dict())
    assert TabularProcessor.from_pretrained(uploaded).to_dict() == TabularProcessor.from_pretrained(card).to_dict()


def test_push_of_changed_weights_leaves_the_old_card_behind(uploaded: Path) -> None:
    model = AutoModelForMultiTask.from_pretrained("mmoe-digits")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.push_to_hub("somebody/digits")
    assert not (uploaded / "results.json").exists()
    text = (uploaded / "README.md").read_text()
    for part in ("MMoEForMultiTask", '"somebody/digits"', "- `parity`: binary"):
        assert part in text
    assert (uploaded / "preprocessor_config.json").exists()


def test_push_of_a_model_from_nowhere(uploaded: Path) -> None:
    make().push_to_hub("somebody/fresh")
    assert {entry.name for entry in uploaded.iterdir()} == {
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    }


def test_transformers_auto_classes_load_a_folder(tmp_path: Path) -> None:
    folder = hub.zoo()["mmoe-digits"]
    assert type(AutoProcessor.from_pretrained(folder)) is TabularProcessor
    assert type(AutoModel.from_pretrained(folder)) is type(AutoModelForMultiTask.from_pretrained(folder))
