"""Checkpoint folders: what loads, what is refused and how, and what saving leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from longcat_cases import GOLDEN, tiny_inputs, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bsa_compile.errors import CheckpointError, UsageError
from bsa_compile.models.longcat import LongCatConfig, LongCatVideoTransformer3DModel, checkpoint

load = LongCatVideoTransformer3DModel.from_pretrained
STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    """A single-file checkpoint of a tiny model."""
    path = tmp_path / "dit"
    tiny_model(depth=2).save_pretrained(path)
    return path


@pytest.fixture
def sharded(tmp_path):
    """The same in several shards."""
    path = tmp_path / "sharded"
    tiny_model(depth=2).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob(f"{STEM}-*.safetensors"))) > 2
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def edit_weights(folder, edit):
    path = folder / f"{STEM}.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- loading ---


def test_parameter_names_are_the_official_ones():
    with safe_open(GOLDEN / "model.safetensors", "pt") as file:
        official = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {k: tuple(v.shape) for k, v in load(GOLDEN).state_dict().items()} == official


@pytest.mark.parametrize("name", ["model.safetensors", f"{STEM}.safetensors"])
def test_loads_either_single_file_name(folder, name):
    os.rename(folder / f"{STEM}.safetensors", folder / name)
    model = load(folder)
    assert_equal_weights(model, tiny_model(depth=2))
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_loads_shards_under_any_index_name(sharded):
    os.rename(sharded / f"{STEM}.safetensors.index.json", sharded / "model.safetensors.index.json")
    model, inputs = load(str(sharded)), tiny_inputs()
    assert_equal_weights(model, tiny_model(depth=2))
    assert torch.equal(model(**inputs.kwargs()), tiny_model(depth=2)(**inputs.kwargs()))


def test_casts_and_moves(folder):
    model = load(folder, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert_equal_weights(model, tiny_model(depth=2).bfloat16())
    assert load(folder, device="cpu").device.type == "cpu"
    assert load(folder, device="meta").device.type == "meta"


def test_keeps_the_dtypes_of_the_file(folder):
    edit_weights(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items() if "ffn" in k}))
    for name, p in load(folder).named_parameters():
        assert p.dtype == (torch.bfloat16 if "ffn" in name else torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_is_memory_mapped(tmp_path):
    def anonymous_bytes():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

    source = tiny_model(hidden_size=512, num_heads=8, depth=3)
    size = sum(p.nbytes for p in source.parameters())
    source.save_pretrained(tmp_path)
    del source
    before = anonymous_bytes()
    model = load(tmp_path)
    grown = anonymous_bytes() - before
    assert size > 40e6
    assert grown < size / 8
    assert sum(p.sum().item() for p in model.parameters()) != 0  # the pages are there when they are read


# --- refused folders ---


def refused(folder, *patterns, **kwargs):
    with pytest.raises(CheckpointError) as info:
        load(folder, **kwargs)
    for pattern in patterns:
        assert re.search(pattern, str(info.value)), f"{pattern!r} not in {info.value}"


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "folder must be an existing checkpoint folder, got '.*none'")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "folder must be an existing checkpoint folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json must exist"),
        (b"{", r"config\.json must be a readable JSON file, got JSONDecodeError"),
        (b"\xff\xfe", r"config\.json must be a readable JSON file, got UnicodeDecodeError"),
        (b"[1]", r"config\.json must hold a JSON object, got list"),
        (b'{"depth": "two"}', r"config\.json: depth must be a positive integer, got 'two'"),
        (b'{"_class_name": "WanTransformer3DModel"}', "_class_name must be 'LongCatVideo.*got 'WanTransformer3DModel'"),
        (b'{"num_head": 2}', r"must hold only known keys, got 'num_head'\. Did you mean 'num_heads'\?"),
        (b'{"qqq": 2}', r"got 'qqq'\. Known keys: adaln_tembed_dim, "),
    ],
    ids=["missing", "truncated", "binary", "list", "type", "class", "typo", "unknown"],
)
def test_bad_config(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    refused(folder, message)


def test_all_tensors_at_fault_are_in_one_error(folder):
    def spoil(tensors):
        del tensors["blocks.0.attn.qkv.bias"], tensors["x_embedder.proj.weight"]
        tensors["blocks.7.attn.qkv.bias"] = torch.zeros(3)
        tensors["final_layer.linear.weight"] = torch.zeros(2, 3)
        tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"].long()

    edit_weights(folder, spoil)
    refused(
        folder,
        r"2 missing: blocks\.0\.attn\.qkv\.bias, x_embedder\.proj\.weight",
        r"1 unexpected: blocks\.7\.attn\.qkv\.bias",
        r"2 wrong shape or type: ",
        r"final_layer\.linear\.weight F32 \[2, 3\] for \[16, 32\]",
        r"final_layer\.linear\.bias I64 \[16\] for \[16\]",
    )


def test_long_lists_are_cut(folder):
    edit_json(folder / "config.json", depth=9)
    with pytest.raises(CheckpointError, match=r"147 missing: blocks\.2\..* and 139 more") as info:
        load(folder)
    assert len(str(info.value)) < 1000


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_truncated_safetensors(folder, keep):
    path = folder / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, rf"{STEM}\.safetensors must be a readable safetensors file, got SafetensorError")


def test_corrupt_safetensors_header(folder):
    path = folder / f"{STEM}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"?" * 50 + data[58:])
    refused(folder, "must be a readable safetensors file, got SafetensorError")


def test_no_weights(folder):
    (folder / f"{STEM}.safetensors").unlink()
    refused(folder, "must hold safetensors weights, got none")


def test_pickles_are_never_read(folder):
    torch.save(tiny_model(depth=2).state_dict(), folder / "pytorch_model.bin")
    load(folder)
    (folder / f"{STEM}.safetensors").unlink()
    refused(folder, r"got \['pytorch_model\.bin'\]\. Only safetensors are read, never pickle\.")


def test_two_sets_of_weights(folder):
    shutil.copy(folder / f"{STEM}.safetensors", folder / "model.safetensors")
    refused(folder, r"must hold one set of weights, got \['model\.safetensors', 'diffusion")


def test_index_names_a_missing_shard(sharded):
    (sharded / sorted(p.name for p in sharded.glob("*.safetensors"))[1]).unlink()
    refused(sharded, rf"index\.json must name shards that exist, got missing {STEM}-00002-of")


@pytest.mark.parametrize("absolute", [False, True])
def test_index_names_files_outside(sharded, folder, absolute):
    weights = folder / f"{STEM}.safetensors"  # a whole and valid checkpoint, but not of this folder
    outside = str(weights) if absolute else os.path.relpath(weights, sharded)
    edit_json(sharded / f"{STEM}.safetensors.index.json", weight_map=dict.fromkeys(load_file(weights), outside))
    refused(sharded, "must name files of its own folder, got")


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}])
def test_malformed_index(sharded, weight_map):
    edit_json(sharded / f"{STEM}.safetensors.index.json", weight_map=weight_map)
    refused(sharded, "must hold a weight_map of tensor names to file names")


def test_index_disagrees_with_the_shards(sharded):
    index = sharded / f"{STEM}.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name, other = min(weight_map), max(weight_map.values())
    edit_json(index, weight_map={**weight_map, name: other})
    refused(sharded, f"1 not in the shard that the index names: {re.escape(name)}")
    tensors = load_file(sharded / other)
    save_file({**tensors, name: torch.zeros(1)}, sharded / other)
    refused(sharded, f"1 in two shards: {re.escape(name)}")


def test_index_lists_a_tensor_that_no_shard_has(sharded):
    index = sharded / f"{STEM}.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = weight_map["final_layer.linear.bias"]
    tensors = load_file(sharded / shard)
    del tensors["final_layer.linear.bias"]
    save_file(tensors, sharded / shard)
    refused(sharded, r"1 missing: final_layer\.linear\.bias")


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_dtype_must_be_a_float_dtype(folder, dtype):
    with pytest.raises(UsageError, match=r"torch_dtype must be a float torch\.dtype"):
        load(folder, torch_dtype=dtype)


# --- saving ---


def test_single_file_layout(folder):
    assert names(folder) == ["config.json", f"{STEM}.safetensors"]
    with safe_open(folder / f"{STEM}.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_sharded_layout(sharded):
    index = json.loads((sharded / f"{STEM}.safetensors.index.json").read_text())
    state = tiny_model(depth=2).state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    for shard in set(index["weight_map"].values()):
        tensors = load_file(sharded / shard)
        assert tensors.keys() == {k for k, v in index["weight_map"].items() if v == shard}
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 40_000
    assert re.fullmatch(rf"{STEM}-00001-of-000\d\d\.safetensors", min(index["weight_map"].values()))


def test_config_survives_with_the_keys_that_mean_nothing_here(folder):
    fields = {
        "_diffusers_version": "0.35.1",
        "_name_or_path": "x",
        "enable_flashattn2": False,
        "enable_flashattn3": True,
        "enable_xformers": False,
        "cp_split_hw": [1, 2],
        "enable_bsa": True,
        "bsa_params": {"sparsity": 0.5, "chunk_3d_shape_q": [4, 4, 4]},
    }
    edit_json(folder / "config.json", **fields)
    expected = json.loads((folder / "config.json").read_text())
    model = load(folder)
    assert model.bsa_enabled is True
    assert model.bsa_params == fields["bsa_params"]
    assert model.bsa_params is not None
    model.bsa_params["sparsity"] = 0.9  # a run-time change, not the checkpoint's
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text()) == expected
    assert load(folder).config == model.config


@pytest.mark.parametrize("said", [{}, {"enable_bsa": False}, {"enable_bsa": True}], ids=["silent", "false", "true"])
def test_saving_says_of_enable_bsa_what_was_said(folder, said):
    """A file that says false switches block-sparse attention off: one that says nothing must not come to say it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("enable_bsa", None)
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    load(folder).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in written.items() if k == "enable_bsa"} == said


def test_config_is_frozen_and_holds_its_own_dicts():
    params = {"sparsity": 0.5}
    config = LongCatConfig(bsa_params=params)
    params["sparsity"] = 2.0
    config.to_dict()["bsa_params"].clear()
    assert config.bsa_params == {"sparsity": 0.5}
    assert hash(config) == hash(LongCatConfig(bsa_params={"sparsity": 0.1}))
    assert config != LongCatConfig()


def test_saving_again_replaces_the_earlier_weights(folder):
    other = tiny_model(seed=1, depth=2)
    other.save_pretrained(folder, max_shard_size=40_000)
    assert f"{STEM}.safetensors" not in names(folder)
    assert_equal_weights(load(folder), other)
    tiny_model(depth=2).save_pretrained(folder)
    assert names(folder) == ["config.json", f"{STEM}.safetensors"]
    assert_equal_weights(load(folder), tiny_model(depth=2))


def test_a_loaded_model_can_be_saved_over_its_own_files(folder):
    model = load(folder)
    with torch.no_grad():
        model.final_layer.linear.bias.add_(1)
    model.save_pretrained(folder)
    assert_equal_weights(load(folder), model)
    assert (model.final_layer.linear.bias != tiny_model(depth=2).final_layer.linear.bias).all()


@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_save_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch, existing):
    target = folder if existing else tmp_path / "new" / "dit"
    written: list[Path] = []

    def failing(tensors, path, metadata):
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(seed=1, depth=2).save_pretrained(target, max_shard_size=40_000)
    assert len(written) == 2
    if existing:
        assert names(folder) == ["config.json", f"{STEM}.safetensors"]
        assert_equal_weights(load(folder), tiny_model(depth=2))
    else:
        assert not target.exists()


def test_files_are_readable_as_the_umask_says(folder):
    modes = {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_saving_refuses_a_folder_with_other_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"must hold no other weights, got \['model\.safetensors'\]"):
        tiny_model().save_pretrained(tmp_path)
    assert names(tmp_path) == ["model.safetensors"]
    with pytest.raises(CheckpointError, match="must be a folder, got a file"):
        tiny_model().save_pretrained(tmp_path / "model.safetensors")


def test_saving_refuses_meta(tmp_path):
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(CheckpointError, match="must hold data, got a meta tensor"):
        model.save_pretrained(tmp_path / "dit")
    assert not (tmp_path / "dit").exists()


def test_saving_keeps_dtypes(tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    assert_equal_weights(load(tmp_path), model)


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("5", 5), ("7B", 7), ("2KB", 2000), ("1.5 MB", 1_500_000), ("10GB", 10**10), ("3gib", 3 * 2**30)],
)
def test_sizes(text, size):
    assert checkpoint.parse_size(text) == size


@pytest.mark.parametrize("text", [0, -1, True, "", "GB", "5 XB", "5I", "0KB", None])
def test_bad_sizes(text):
    with pytest.raises(UsageError, match="max_shard_size must be"):
        checkpoint.parse_size(text)
