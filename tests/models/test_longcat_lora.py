"""LoRA files, and switching them on and off."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from longcat_cases import relative_error, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

from bsa_compile.errors import CheckpointError, UsageError
from bsa_compile.models.longcat.linear import LoRALinear

DOT = "___lorahyphen___"


def key(module, part):
    return f"lora{DOT}{module.replace('.', DOT)}.{part}"


def term(module, inputs, outputs, rank=4, parts=1, alpha=0.5, seed=0):
    """A module's tensors in the file format."""
    g = torch.Generator().manual_seed(seed)
    tensors = {key(module, "lora_down.weight"): torch.randn(parts * rank, inputs, generator=g)}
    for i in range(parts):
        name = "lora_up.weight" if parts == 1 else f"lora_up.blocks.{i}.weight"
        tensors[key(module, name)] = torch.randn(outputs // parts, rank, generator=g)
    if alpha is not None:
        tensors[key(module, "alpha_scale")] = torch.tensor(alpha)
    return tensors


QKV = term("blocks.0.attn.qkv", 32, 96, parts=3, seed=1)
PROJ = term("blocks.0.attn.proj", 32, 32, seed=2)
ADALN = term("blocks.0.adaLN_modulation.1", 16, 192, seed=3)


@pytest.fixture
def file(tmp_path):
    """Write tensors to a LoRA file and give its path."""

    def write(*terms, name="lora.safetensors"):
        path = tmp_path / name
        save_file({k: v for t in terms for k, v in t.items()}, path)
        return path

    return write


def expected_update(tensors, x, scale):
    """up(down(x)) * scale, from the definition."""
    down = next(v for k, v in tensors.items() if "lora_down" in k)
    ups = [v for k, v in sorted(tensors.items()) if "lora_up" in k]
    hidden = (x @ down.T).chunk(len(ups), dim=-1)
    return torch.cat([h @ up.T for h, up in zip(hidden, ups, strict=True)], dim=-1) * scale


@pytest.mark.parametrize("tensors", [QKV, PROJ, ADALN], ids=["fused", "single", "fp32"])
@pytest.mark.parametrize("multiplier", [1.0, -2.5])
@torch.no_grad()
def test_layer_output(file, tensors, multiplier):
    model = tiny_model()
    model.load_lora(file(tensors), "a", multiplier)
    name = next(iter(tensors)).split(".")[0].removeprefix(f"lora{DOT}").replace(DOT, ".")
    layer = model.get_submodule(name)
    x = torch.randn(2, 3, layer.in_features)
    plain = layer(x)
    assert torch.equal(plain, F.linear(x, layer.weight, layer.bias))  # loading alone changes nothing
    model.enable_loras(["a"])
    torch.testing.assert_close(layer(x), plain + expected_update(tensors, x, 0.5 * multiplier), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "scale"), [(4, 16.0), (8, 8.0)])
@torch.no_grad()
def test_alpha_is_64_over_rank_when_the_file_has_none(file, rank, scale):
    model = tiny_model()
    tensors = term("blocks.0.attn.qkv", 32, 96, rank=rank, parts=3, alpha=None)
    model.load_lora(file(tensors), "a")
    layer = model.blocks[0].attn.qkv
    x = torch.randn(5, 32)
    plain = layer(x)
    model.enable_loras(["a"])
    torch.testing.assert_close(layer(x) - plain, expected_update(tensors, x, scale), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_enabling_replaces_the_active_set(file):
    model, inputs = tiny_model(), tiny_inputs()
    other = term("blocks.0.attn.qkv", 32, 96, seed=7)
    model.load_lora(file(QKV, PROJ, name="a.safetensors"), "a")
    model.load_lora(file(other, name="b.safetensors"), "b")
    layer, x = model.blocks[0].attn.qkv, torch.randn(5, 32)
    plain, plain_out = layer(x), model(**inputs.kwargs())
    updates = {"a": expected_update(QKV, x, 0.5), "b": expected_update(other, x, 0.5)}
    for keys in (["a"], ["b"], ["a", "b"], ["b", "a"], []):
        model.enable_loras(keys)
        assert model.active_loras == tuple(keys)
        torch.testing.assert_close(layer(x), plain + sum(updates[k] for k in keys), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**inputs.kwargs()), plain_out)
    model.enable_loras(["a"])
    assert relative_error(model(**inputs.kwargs()), plain_out) > 1e-2
    model.disable_all_loras()
    assert model.active_loras == ()
    assert torch.equal(model(**inputs.kwargs()), plain_out)


def test_parameters_and_checkpoints_do_not_change(file, tmp_path):
    model = tiny_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = [id(p) for p in model.parameters()]
    model.load_lora(file(QKV, PROJ), "a")
    model.enable_loras(["a"])
    model.save_pretrained(tmp_path / "dit")
    saved = load_file(tmp_path / "dit" / "diffusion_pytorch_model.safetensors")
    for now in (model.state_dict(), saved):
        assert now.keys() == state.keys()
        assert all(torch.equal(now[k], state[k]) for k in state)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.buffers()) == []


@torch.no_grad()
def test_active_loras_move_with_the_model(file):
    model, inputs = tiny_model(), tiny_inputs()
    model.load_lora(file(QKV, PROJ, ADALN), "a")
    model.enable_loras(["a"])
    expected = model(**inputs.kwargs())
    model.to(torch.bfloat16)
    assert {x.dtype for x in terms_of(model)} == {torch.bfloat16}
    assert relative_error(model(**inputs.kwargs()), expected) < 5e-2
    model.to("meta")
    assert {x.device.type for x in terms_of(model)} == {"meta"}
    assert len(terms_of(model)) == 4 + 2 + 2


@torch.no_grad()
def test_enabling_uses_the_models_present_dtype(file):
    model = tiny_model()
    model.load_lora(file(QKV), "a")
    model.bfloat16()
    model.enable_loras(["a"])
    assert {x.dtype for x in terms_of(model)} == {torch.bfloat16}
    model.disable_all_loras()
    model.float()
    model.enable_loras(["a"])  # from the file again: nothing was rounded for good
    down = next(x for x in terms_of(model) if x.shape == (12, 32))
    assert torch.equal(down, QKV[key("blocks.0.attn.qkv", "lora_down.weight")])


def terms_of(model):
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    return [x for layer in layers for t in layer.lora_terms for x in (t.down, *t.ups)]


@torch.no_grad()
def test_autocast(file):
    model, inputs = tiny_model(), tiny_inputs()
    model.load_lora(file(QKV, PROJ, ADALN), "a")
    model.enable_loras(["a"])
    expected = model(**inputs.kwargs())
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < relative_error(model(**inputs.kwargs()), expected) < 5e-2


def changed(tensors, **changes):
    """The tensors with some replaced, or dropped where the new value is None; names are those after the module."""
    module = next(iter(tensors)).split(".")[0]
    out = dict(tensors)
    for part, value in changes.items():
        name = f"{module}.{part.replace('__', '.')}"
        out.pop(name, None)
        if value is not None:
            out[name] = value
    return out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (term("blocks.3.attn.qkv", 32, 96), r"blocks\.3\.attn\.qkv: no linear layer of that name"),
        (term("blocks.0.attn", 32, 96), r"blocks\.0\.attn: no linear layer of that name"),
        (term("x_embedder.proj", 16, 32), r"x_embedder\.proj: no linear layer"),
        (term("blocks.0.attn.qkv", 31, 96), r"qkv: lora_down \[4, 31\] .* do not fit the layer's 32 inputs and 96 out"),
        (term("blocks.0.attn.qkv", 32, 90, parts=3), r"lora_up \[\[30, 4\], \[30, 4\], \[30, 4\]\] do not fit"),
        (changed(PROJ, lora_up__weight=torch.zeros(32, 5)), r"lora_up \[\[32, 5\]\] do not fit"),
        (changed(QKV, lora_down__weight=torch.zeros(13, 32)), r"lora_down \[13, 32\] .* do not fit"),
        (changed(PROJ, lora_down__weight=torch.zeros(0, 32), lora_up__weight=torch.zeros(32, 0)), "do not fit"),
        (changed(PROJ, lora_down__weight=torch.zeros(4)), "are not matrices"),
        (changed(PROJ, lora_down__weight=torch.zeros(4, 32).int()), "tensors are not floats"),
        (changed(PROJ, lora_down__weight=None), r"needs lora_down\.weight and either"),
        (changed(PROJ, lora_up__weight=None), r"needs lora_down\.weight and either"),
        (changed(QKV, lora_up__weight=torch.zeros(96, 4)), r"needs lora_down\.weight and either"),
        (changed(QKV, lora_up__blocks__1__weight=None), r"unknown keys \['lora_up\.blocks\.2\.weight'\]"),
        (changed(PROJ, alpha_scale=torch.zeros(2)), "alpha_scale is not one finite number"),
        (changed(PROJ, alpha_scale=torch.tensor(float("nan"))), "alpha_scale is not one finite number"),
        (changed(PROJ, dora_scale=torch.ones(1)), r"unknown keys \['dora_scale'\]"),
        ({"blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 32)}, "unknown key 'blocks.0.attn.qkv.lora_A.weight'"),
        ({}, "must be a LoRA of this model, got no tensors"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(file, tensors, message):
    model = tiny_model()
    with pytest.raises(CheckpointError, match=message):
        model.load_lora(file(tensors), "a")
    with pytest.raises(UsageError):
        model.enable_loras(["a"])
    model.load_lora(file(QKV), "a")  # the name stayed free


def test_every_fault_is_in_one_error_and_nothing_is_loaded(file):
    model = tiny_model()
    path = file(QKV, term("blocks.3.attn.qkv", 32, 96), term("blocks.0.ffn.w1", 3, 256), {"odd": torch.zeros(1)})
    with pytest.raises(CheckpointError) as info:
        model.load_lora(path, "a")
    for pattern in (
        r"unknown key 'odd'",
        r"blocks\.3\.attn\.qkv: no linear",
        r"blocks\.0\.ffn\.w1: lora_down \[4, 3\]",
    ):
        assert re.search(pattern, str(info.value))
    assert "Nothing was loaded." in str(info.value)
    assert terms_of(model) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_unreadable_files_are_refused(file, tmp_path, damage):
    path = file(QKV)
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": data[:-9], "text": b"not a tensor file" * 9}[damage])
    with pytest.raises(CheckpointError, match=r"lora\.safetensors must be a readable safetensors file"):
        tiny_model().load_lora(str(path), "a")


def test_names(file):
    model, path = tiny_model(), file(QKV)
    model.load_lora(path, "a")
    with pytest.raises(UsageError, match=r"key must be a new name, got 'a'\. .*unload_lora"):
        model.load_lora(path, "a")
    model.enable_loras("a")  # one name is as good as a list of it
    before = terms_of(model)
    with pytest.raises(UsageError, match=r"among the loaded LoRAs \['a'\], got \['b'\]\. Call load_lora first\."):
        model.enable_loras(["a", "b"])
    with pytest.raises(UsageError, match=r"keys must name each LoRA once, got \['a', 'a'\]"):
        model.enable_loras(["a", "a"])
    assert model.active_loras == ("a",)
    assert all(x is y for x, y in zip(terms_of(model), before, strict=True))
    with pytest.raises(UsageError, match="key must not be active, got 'a'"):
        model.unload_lora("a")
    model.disable_all_loras()
    model.unload_lora("a")
    with pytest.raises(UsageError, match="among the loaded LoRAs"):
        model.unload_lora("a")
    model.load_lora(path, "a")


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf"), "1", None, True])
def test_multiplier_must_be_a_finite_number(file, multiplier):
    with pytest.raises(UsageError, match="multiplier must be a finite number"):
        tiny_model().load_lora(file(QKV), "a", multiplier)


@torch.no_grad()
def test_compiled_code_sees_every_switch_and_recompiles_only_for_new_shapes(file):
    model, inputs = tiny_model(), tiny_inputs(grid=(2, 4, 6))
    path = file(QKV, PROJ, ADALN)
    model.load_lora(path, "a")
    model.load_lora(path, "b", 0.3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts, outputs = [], []
    for keys in ([], ["a"], [], ["b"], ["a", "b"], ["b"]):
        model.enable_loras(keys)
        outputs.append(compiled(**inputs.kwargs()))
        counts.append(counter.frame_count)
        assert relative_error(outputs[-1], model(**inputs.kwargs())) < 1e-6
    assert counts == [1, 2, 2, 2, 3, 3]
    assert relative_error(outputs[3], outputs[1]) > 1e-2


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@torch.no_grad()
def test_exports(file, strict):
    model, inputs = tiny_model(), tiny_inputs(grid=(2, 4, 6))
    plain = model(**inputs.kwargs())
    model.load_lora(file(QKV, PROJ, ADALN), "a")
    model.enable_loras(["a"])
    expected = model(**inputs.kwargs())
    program = torch.export.export(model, (), inputs.kwargs(), strict=strict)
    model.disable_all_loras()
    assert relative_error(program.module()(**inputs.kwargs()), expected) < 1e-6
    assert relative_error(plain, expected) > 1e-2
