import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from moe_mtl import TabularProcessor, hub
from moe_mtl.checkpoint import Checkpoint
from moe_mtl.files import CheckpointError, ModelNotFoundError, UnsafeFileError

DOCUMENTED = (CheckpointError, ModelNotFoundError, UnsafeFileError)
TENSORS = {"trunk.weight": torch.arange(12.0).reshape(4, 3), "towers.ctr.bias": torch.tensor([1.0, 2.0])}


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mmoe"}')
    save_file(TENSORS, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"trunk.weight": TENSORS["trunk.weight"]}, folder / "model-1.safetensors")
    save_file({"towers.ctr.bias": TENSORS["towers.ctr.bias"]}, folder / "model-2.safetensors")
    write_index(folder, {"trunk.weight": "model-1.safetensors", "towers.ctr.bias": "model-2.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


# --- names


def test_errors_are_what_callers_catch():
    assert issubclass(ModelNotFoundError, FileNotFoundError)
    assert issubclass(UnsafeFileError, ValueError)
    assert issubclass(CheckpointError, ValueError)


@pytest.mark.parametrize("name", ["", "~nobody-of-that-name/x", "a" * 400, "a/b/c", "bad\0name"])
def test_odd_names_are_no_models(name):
    with pytest.raises(ModelNotFoundError, match="expected a model folder, a zoo name or a Hub id"):
        hub.resolve(name)


def test_resolve_folder_zoo_and_nearest(model, monkeypatch, tmp_path):
    zoo = tmp_path / "model_cards"
    for name in ("mmoe-census-income-half", "ple-digits", ".hidden"):
        (zoo / name).mkdir(parents=True)
        (zoo / name / "config.json").write_text("{}")
    (zoo / "no-config").mkdir()
    monkeypatch.setattr(hub, "zoo_folder", lambda: zoo)
    assert list(hub.zoo()) == ["mmoe-census-income-half", "ple-digits"]
    assert hub.resolve(model) == hub.resolve(str(model)) == model
    assert hub.resolve("ple-digits") == zoo / "ple-digits"
    with pytest.raises(ModelNotFoundError, match="nearest: mmoe-census-income-half"):
        hub.resolve("mmoe-census-income-hlaf")
    with pytest.raises(ModelNotFoundError, match="found a file"):
        hub.resolve(model / "config.json")
    with pytest.raises(ModelNotFoundError, match="no folder here and could not be had from the Hub"):
        hub.resolve("someone/ple-digits", local_files_only=True, cache_dir=tmp_path / "cache")


def test_the_hub_is_asked_for_data_files_only(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve("org/name", revision="v1", token="t") == tmp_path
    assert (asked["name"], asked["revision"], asked["token"]) == ("org/name", "v1", "t")
    hub_options = {"revision": "v2", "cache_dir": tmp_path, "local_files_only": True, "token": "u"}
    with pytest.raises(ModelNotFoundError, match="a file preprocessor_config"):
        TabularProcessor.from_pretrained("org/name", **hub_options)
    assert {key: asked[key] for key in hub_options} == hub_options
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model.safetensors", "config.json", "README.md"]
    wanted += ["chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]  # of language models
    refused = ["pytorch_model.bin", "modeling.py", "old/config.json", "old/vocab.txt", "tokenizer.py", "notes.txt"]
    refused += ["other.jinja", "vocab.txt.pkl", "my_merges.txt", "x.model"]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects(wanted + refused, **patterns)) == wanted


def test_data_folders_of_checkout_and_wheel(monkeypatch, tmp_path):
    package = tmp_path / "moe_mtl"
    package.mkdir()
    monkeypatch.setattr(hub, "__file__", str(package / "hub.py"))
    assert hub.recipes_folder() == tmp_path / "recipes"
    (package / "_recipes").mkdir()
    (package / "_model_cards").mkdir()
    assert hub.recipes_folder() == package / "_recipes"
    assert hub.zoo_folder() == package / "_model_cards"


def test_headers_are_checked_without_torch(model):
    imports = "import sys; from moe_mtl.checkpoint import Checkpoint"
    code = f"{imports}; Checkpoint(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, model]).returncode == 0


# --- reading


@pytest.mark.parametrize("kind", ["model", "sharded"])
def test_read(request, kind):
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    assert checkpoint.shapes == {"trunk.weight": (4, 3), "towers.ctr.bias": (2,)}
    assert checkpoint.dtypes == {"trunk.weight": "F32", "towers.ctr.bias": "F32"}
    assert checkpoint.num_elements == 14
    assert checkpoint.bytes_read == 0
    assert torch.equal(checkpoint.read("towers.ctr.bias"), TENSORS["towers.ctr.bias"])
    assert checkpoint.bytes_read == 2 * 4
    assert torch.equal(checkpoint.read("trunk.weight", [2, 0]), TENSORS["trunk.weight"][[2, 0]])
    assert checkpoint.bytes_read == 2 * 4 + 2 * 3 * 4
    for name, tensor in read_all(checkpoint).items():
        assert torch.equal(tensor, TENSORS[name])
    assert checkpoint.read("trunk.weight").shape == (4, 3)


def test_other_dtypes_and_empty_tensors(tmp_path):
    tensors = {
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.ones(0, 5),
        "bool": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in read_all(checkpoint).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    assert checkpoint.bytes_read == 4 + 8 + 0 + 1


def test_tensors_begin_where_they_would_had_torch_made_them(tmp_path):
    """On some processors the last bit of a product depends on where its operands begin: a loaded model must give the
    numbers of the one that was saved."""
    save_file({f"odd{i}": torch.ones(2 * i + 1) for i in range(8)}, tmp_path / "model.safetensors")
    tensors = read_all(Checkpoint(tmp_path))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_what_changes_after_its_header_was_read_is_noticed(model):
    weights = model / "model.safetensors"
    for harm, message in (
        (lambda: os.utime(weights, ns=(1, 1)), "changed while its weights were in use"),
        (lambda: os.truncate(weights, 100), "changed while"),
        (weights.unlink, "was removed while"),
        (lambda: (weights.unlink(), weights.mkdir()), "cannot be read any more"),
        (lambda: (weights.unlink(), os.mkfifo(weights)), "changed while"),  # from which nobody would ever read
    ):
        checkpoint = Checkpoint(model)
        harm()
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read("trunk.weight")
        if weights.is_dir():
            weights.rmdir()
        weights.unlink(missing_ok=True)
        save_file(TENSORS, weights)


def test_a_side_that_no_tensor_can_have_is_refused(tmp_path):
    text = json.dumps({"x": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="as the shape of x"):
        Checkpoint(tmp_path)


def test_rows_and_names_out_of_range(model):
    checkpoint = Checkpoint(model)
    for rows in ([4], [-1]):
        with pytest.raises(IndexError, match=r"shape \[4, 3\]"):
            checkpoint.read("trunk.weight", rows)
    with pytest.raises(KeyError, match=r"trunk.weight"):
        checkpoint.read("trunk.weigth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(tmp_path, value):
    save_file({"good": torch.ones(3), "bad": torch.tensor([[1.0], [value]])}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("good")
    assert torch.equal(checkpoint.read("bad", [0]), torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="1 NaN or infinite values in bad"):
        checkpoint.read("bad")


def test_check_lists_everything_at_once(model):
    checkpoint = Checkpoint(model)
    checkpoint.check({"trunk.weight": [4, 3], "towers.ctr.bias": (2,)})
    with pytest.raises(CheckpointError) as error:
        checkpoint.check({"trunk.weight": (10**9, 3), "gate": (1,)})
    for part in ("1 missing: gate", "1 unexpected: towers.ctr.bias", "expected [1000000000, 3], found [4, 3]"):
        assert part in str(error.value)
    assert checkpoint.bytes_read == 0


# --- malicious and broken folders


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "owned"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_and_never_loaded(tmp_path, name):
    folder, trace = tmp_path / "m", tmp_path / "trace"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(UnsafeFileError, match=f"{name}.*refused"):
        Checkpoint(folder)
    assert not trace.exists()
    (folder / "model.safetensors").write_bytes((folder / name).read_bytes())  # a pickle under another name
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint(folder)
    assert not trace.exists()


@pytest.mark.parametrize("how", ["relative", "absolute", "subfolder", "newline", "number", "pickle", "backslash"])
def test_shard_names_that_leave_the_folder_are_refused(sharded, tmp_path, how):
    outside = tmp_path / "evil.safetensors"
    save_file({"trunk.weight": TENSORS["trunk.weight"]}, outside)
    shard = {
        "relative": "../evil.safetensors",
        "absolute": str(outside),
        "subfolder": "sub/evil.safetensors",
        "newline": "model-1.safetensors\n",
        "number": 1,
        "pickle": "pytorch_model.bin",
        "backslash": "..\\evil.safetensors",
    }[how]
    write_index(sharded, {"trunk.weight": shard, "towers.ctr.bias": "model-2.safetensors"})
    with pytest.raises(UnsafeFileError, match=r"trunk.weight"):
        Checkpoint(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_refused(model, tmp_path, name):
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    read = {"config.json": hub.read_config, "model.safetensors": Checkpoint}[name]
    with pytest.raises(UnsafeFileError, match="found a link to"):
        read(model)


def test_a_snapshot_of_the_hub_cache_loads(model, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("model.safetensors", "config.json")):
        (model / name).rename(repository / "blobs" / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert hub.read_config(snapshot)["model_type"] == "mmoe"
    assert torch.equal(Checkpoint(snapshot).read("trunk.weight"), TENSORS["trunk.weight"])


def test_indices_that_contradict_the_shards(sharded):
    good = {"trunk.weight": "model-1.safetensors", "towers.ctr.bias": "model-2.safetensors"}
    for weight_map, message in [
        (good | {"trunk.weight": "model-2.safetensors"}, "trunk.weight is in model-2.safetensors"),
        (good | {"more": "model-1.safetensors"}, "more is in model-1.safetensors"),
        ({"trunk.weight": "model-1.safetensors"} | {"x": "model-2.safetensors"}, "x is in model-2"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ]:
        write_index(sharded, weight_map)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(sharded)
    write_index(sharded, good | {"trunk.weight": "model-3.safetensors"})
    with pytest.raises(ModelNotFoundError, match=r"model-3.safetensors"):
        Checkpoint(sharded)
    save_file(TENSORS, sharded / "model-2.safetensors")
    write_index(sharded, good)
    with pytest.raises(CheckpointError, match=r"trunk.weight is in two files"):
        Checkpoint(sharded)
    save_file({"towers.ctr.bias": torch.ones(2), "extra": torch.ones(1)}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors in the shards .* extra"):
        Checkpoint(sharded)


def test_folders_without_or_with_two_sets_of_weights(model, tmp_path):
    with pytest.raises(ModelNotFoundError, match="expected a model folder"):
        Checkpoint(tmp_path / "nowhere")
    write_index(model, {"trunk.weight": "model.safetensors"})
    with pytest.raises(CheckpointError, match="found both"):
        Checkpoint(model)
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="found neither"):
        Checkpoint(model)


def test_every_truncation_is_refused(model):
    whole = (model / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (model / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model.safetensors .* truncated"):
            Checkpoint(model)


def header(content: dict, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = 2**62


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100 * 2**20) + b"{}",
        header({"x": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}}, b"0000"),
        header({"x": {"dtype": "F32", "shape": [10**9, 10**3], "data_offsets": [0, 4 * 10**12]}}, b"0000"),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"0000"),
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, b"0000"),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000trailing"),
        header({"x": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    ],
    ids=[
        "length-2^63",
        "length-100MB",
        "overflow",
        "giant",
        "negative",
        "shape-and-offsets",
        "overlap",
        "tail",
        "dtype",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        Checkpoint(tmp_path)


def test_a_huge_header_in_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**34))
        file.truncate(2**36)  # sparse: the declared length is there
    with pytest.raises(CheckpointError, match="header of 17,179,869,184"):
        Checkpoint(tmp_path)


def test_a_giant_tensor_is_refused_by_its_shape_before_it_is_allocated(tmp_path):
    text = json.dumps({"x": {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**36)  # sparse, consistent in itself
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="expected \\[3\\], found \\[17179869184\\]"):
        checkpoint.check({"x": (3,)})


def test_unusual_dtypes_are_refused(tmp_path):
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dtypes .* F8_E4M3"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "mmoe", "auto_map": {"AutoModel": "evil.Model"}}, UnsafeFileError, "auto_map"),
        ({"model_type": "mmoe", "trust_remote_code": True}, UnsafeFileError, "trust_remote_code"),
        ({}, CheckpointError, "model_type"),
        ({"model_type": 3}, CheckpointError, "found 3"),
    ],
)
def test_configs_that_are_refused(model, config, error, message):
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        hub.read_config(model)


def test_no_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config.json"):
        hub.read_config(tmp_path)


def test_the_manifest_finds_a_flipped_bit_anywhere(model):
    hub.write_manifest(model)
    Checkpoint(model)
    for name in ("model.safetensors", "config.json"):
        whole = (model / name).read_bytes()
        (model / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name} .* damaged"):
            Checkpoint(model)
        (model / name).write_bytes(whole)
    (model / "manifest.json").write_text('{"sha256": {"../x": "0"}}')
    with pytest.raises(UnsafeFileError):
        Checkpoint(model)


# --- fuzzing: whatever the bytes, only documented errors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("model-1.safetensors"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["weight_map", "metadata", "model_type", "auto_map", "sha256"]) | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def only_documented_errors(call) -> None:
    with contextlib.suppress(*DOCUMENTED):
        call()


@settings(max_examples=150, deadline=None)
@given(content=JSON.map(lambda c: json.dumps(c).encode()) | st.binary(max_size=200))
def test_fuzz_json(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file(TENSORS, folder / "model-1.safetensors")
    for name in ("model.safetensors.index.json", "config.json", "manifest.json"):
        (folder / name).write_bytes(content)
    only_documented_errors(lambda: hub.read_config(folder))
    only_documented_errors(lambda: Checkpoint(folder))


@settings(max_examples=100, deadline=None)
@given(
    weight_map=st.dictionaries(
        st.sampled_from(list(TENSORS)) | st.text(),
        st.sampled_from(["model-1.safetensors", "../model-1.safetensors", "/model-1.safetensors"]) | JSON,
        max_size=3,
    )
)
def test_fuzz_the_index(tmp_path_factory, weight_map):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file(TENSORS, folder / "model-1.safetensors")
    write_index(folder, weight_map)
    only_documented_errors(lambda: Checkpoint(folder))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 250), byte=st.integers(0, 255))
def test_fuzz_the_weights(tmp_path_factory, position, byte):
    folder = tmp_path_factory.mktemp("fuzz")
    whole = bytearray(save(TENSORS))
    whole[position % len(whole)] = byte
    (folder / "model.safetensors").write_bytes(bytes(whole))
    only_documented_errors(lambda: read_all(Checkpoint(folder)))
