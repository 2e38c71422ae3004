"""LoRAs that are made, trained and saved."""

from __future__ import annotations

import pytest
import torch
from longcat_cases import relative_error, tiny_inputs, tiny_model
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from bsa_compile.errors import CheckpointError, UsageError
from bsa_compile.models.longcat.linear import LoRALinear

DOT = "___lorahyphen___"
INPUTS = tiny_inputs(grid=(2, 4, 6))
# A scale that is no power of two: a product rounded twice would show.
ALPHA = 0.7


def new_lora(model, key="a", rank=3, seed=0, **options):
    """An enabled LoRA with an effect."""
    generator = torch.Generator().manual_seed(seed)
    model.add_lora(key, rank, alpha=ALPHA, generator=generator, **options)
    with torch.no_grad():
        for p in model.lora_parameters(key):
            p.copy_(torch.randn(p.shape, generator=generator))
    model.enable_loras([key])


def run(model):
    return model(**INPUTS.kwargs())


def layers_of(model, key):
    return {name.split(".")[0].removeprefix(f"lora{DOT}").replace(DOT, ".") for name in model.lora_state_dict(key)}


@torch.no_grad()
def test_a_new_lora_changes_nothing_before_it_is_trained():
    model = tiny_model()
    plain = run(model)
    model.add_lora("a", 4)
    assert torch.equal(run(model), plain)
    model.enable_loras(["a"])
    assert torch.equal(run(model), plain)
    for p in model.lora_parameters("a"):
        p.add_(0.1)  # as an optimizer does: in place
    assert relative_error(run(model), plain) > 1e-2
    model.disable_all_loras()
    assert torch.equal(run(model), plain)


def test_it_stands_beside_the_models_own_parameters(tmp_path):
    model = tiny_model()
    names, state = [n for n, _ in model.named_parameters()], set(model.state_dict())
    new_lora(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert set(model.state_dict()) == state
    model.requires_grad_(False)
    run(model).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.lora_parameters("a"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_saved_lora_gives_the_same_bits(tmp_path, dtype):
    model = tiny_model().to(dtype)
    # Modulation and head compute in fp32 whatever the weights' dtype.
    new_lora(model, targets=["blocks.*", "final_layer.*"])
    trained = run(model)
    model.save_lora(tmp_path / "made" / "lora.safetensors", "a")
    fresh = tiny_model().to(dtype)
    assert relative_error(trained, run(fresh)) > 1e-2
    fresh.load_lora(tmp_path / "made" / "lora.safetensors", "b")
    fresh.enable_loras(["b"])
    assert torch.equal(run(fresh), trained)
    fresh.load_lora(tmp_path / "made" / "lora.safetensors", "c", trainable=True)
    fresh.enable_loras(["c"])
    assert torch.equal(run(fresh), trained)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["lora.safetensors"]


def test_the_file_has_longcats_layout(tmp_path):
    model = tiny_model()
    new_lora(model, rank=4)
    model.save_lora(tmp_path / "lora.safetensors", "a")
    saved = load_file(tmp_path / "lora.safetensors")
    start = f"lora{DOT}blocks{DOT}0{DOT}"
    shapes = {n.removeprefix(start): tuple(x.shape) for n, x in saved.items() if f"{DOT}attn{DOT}" in n}
    assert shapes == {
        f"attn{DOT}qkv.lora_down.weight": (12, 32),
        **{f"attn{DOT}qkv.lora_up.blocks.{i}.weight": (32, 4) for i in range(3)},
        f"attn{DOT}qkv.alpha_scale": (),
        f"attn{DOT}proj.lora_down.weight": (4, 32),
        f"attn{DOT}proj.lora_up.weight": (32, 4),
        f"attn{DOT}proj.alpha_scale": (),
    }
    assert float(saved[f"{start}attn{DOT}proj.alpha_scale"]) == pytest.approx(ALPHA / 4)
    assert f"{start}cross_attn{DOT}kv_linear.lora_up.blocks.1.weight" in saved
    assert len({n.split(".")[0] for n in saved}) == 8  # attn 2, cross_attn 3, ffn 3


def test_alpha_is_half_the_rank_by_default():
    model = tiny_model()
    model.add_lora("a", 6)
    scales = {float(x) for n, x in model.lora_state_dict("a").items() if n.endswith("alpha_scale")}
    assert scales == {0.5}


def test_targets_choose_the_layers():
    model = tiny_model(depth=2)
    model.add_lora("one", 2, "blocks.1.attn.qkv")
    assert layers_of(model, "one") == {"blocks.1.attn.qkv"}
    model.add_lora("two", 2, ["blocks.0.ffn.*", "blocks.*.attn.proj"])
    assert layers_of(model, "two") == {
        *(f"blocks.0.ffn.w{i}" for i in (1, 2, 3)),
        *(f"blocks.{i}.attn.proj" for i in (0, 1)),
    }


@torch.no_grad()
def test_the_multiplier_goes_into_the_file(tmp_path):
    model = tiny_model()
    new_lora(model)
    model.save_lora(tmp_path / "a.safetensors", "a")
    model.load_lora(tmp_path / "a.safetensors", "b", -0.3)
    model.enable_loras(["b"])
    want = run(model)
    model.save_lora(tmp_path / "b.safetensors", "b")  # one that was loaded can be saved too
    model.load_lora(tmp_path / "b.safetensors", "c")
    model.enable_loras(["c"])
    assert torch.equal(run(model), want)
    model.save_lora(tmp_path / "b.safetensors", "a")  # over a file that is mapped: what is loaded keeps its values
    assert torch.equal(run(model), want)


def test_parameters_stay_those_of_the_optimizer_and_keep_their_dtype():
    model = tiny_model()
    new_lora(model)
    before = model.lora_parameters("a")
    values = [p.detach().clone() for p in before]
    layer = model.blocks[0].attn.proj
    model.to(torch.bfloat16)
    assert any(layer.lora_terms[0].down is p for p in before)
    model.disable_all_loras()
    model.enable_loras(["a"])
    assert any(layer.lora_terms[0].down is p for p in before)
    for now, p, value in zip(model.lora_parameters("a"), before, values, strict=True):
        assert now is p
        assert torch.equal(p, value)  # fp32 still: a step of 1e-4 would be lost in bf16
    assert run(model).dtype == torch.float32
    run(model).square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in before)


def test_meta_has_no_room_for_them():
    model = tiny_model()
    new_lora(model)
    model.to("meta")
    terms = [t for m in model.modules() if isinstance(m, LoRALinear) for t in m.lora_terms]
    assert {x.device.type for t in terms for x in (t.down, *t.ups, t.scale)} == {"meta"}
    assert {p.device.type for p in model.lora_parameters("a")} == {"cpu"}  # what was trained is not lost


def test_a_few_steps_reach_the_target_and_compile_once():
    torch.manual_seed(0)
    model = tiny_model().requires_grad_(False)
    model.add_lora("a", 4)
    model.enable_loras(["a"])
    target = torch.randn_like(run(model))
    optimizer = torch.optim.Adam(model.lora_parameters("a"), lr=3e-2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    losses = []
    for _ in range(8):
        loss = (run(compiled) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert counter.frame_count == 1


@torch.no_grad()
def test_without_trainable_loras_leaves_only_those_of_files(tmp_path):
    model = tiny_model()
    new_lora(model, "file")
    model.save_lora(tmp_path / "a.safetensors", "file")
    model.disable_all_loras()
    model.unload_lora("file")
    model.load_lora(tmp_path / "a.safetensors", "file")
    model.enable_loras(["file"])
    want = run(model)
    new_lora(model, "trained", seed=1)
    model.enable_loras(["trained", "file"])
    both = run(model)
    with model.without_trainable_loras():
        assert torch.equal(run(model), want)
    assert torch.equal(run(model), both)
    assert relative_error(both, want) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"key": ""}, "key must be a name, got ''"),
        ({"key": 3}, "key must be a name, got 3"),
        ({"key": "used"}, "key must be a new name, got 'used'"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"rank": True}, "rank must be an integer >= 1, got True"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"targets": ["blocks.*.attn.*", "blocks.*.mlp.*"]}, r"name linear layers of the model, got 'blocks\.\*\.mlp"),
        ({"targets": "x_embedder.proj"}, r"got 'x_embedder\.proj'\. Linear layers are named .*qkv"),
        ({"targets": []}, "targets must name at least one linear layer"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, text):
    model = tiny_model()
    model.add_lora("used", 1)
    with pytest.raises(UsageError, match=text):
        model.add_lora(**{"key": "a", **arguments})
    with pytest.raises(UsageError):
        model.enable_loras(["a"])


def test_what_cannot_be_trained_or_saved(tmp_path):
    model = tiny_model()
    new_lora(model)
    path = tmp_path / "a.safetensors"
    model.save_lora(path, "a")
    model.load_lora(path, "b")
    with pytest.raises(UsageError, match=r"key must name a LoRA that can be trained, got 'b'\. .*trainable=True"):
        model.lora_parameters("b")
    for call in (model.lora_parameters, model.lora_state_dict, lambda key: model.save_lora(path, key)):
        with pytest.raises(UsageError, match="among the loaded LoRAs"):
            call("c")
    with pytest.raises(UsageError, match="trainable must be True or False"):
        model.load_lora(path, "c", trainable=1)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="path must be a file"):
        model.save_lora(tmp_path, "a")
    with pytest.raises(UsageError, match="path must lie in a folder"):
        model.save_lora(path / "b.safetensors", "a")
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="do not fit"):
        tiny_model(hidden_size=64).load_lora(path, "a", trainable=True)
