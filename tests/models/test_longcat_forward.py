"""Conditioning, cache, masks, precision, gradients, and the request for block-sparse attention: eager behaviour."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from longcat_cases import relative_error, tiny_inputs, tiny_model

from bsa_compile.models.longcat import Attention, LongCatVideoTransformer3DModel, dense_attention
from bsa_compile.models.longcat.attention import CrossAttention
from bsa_compile.models.longcat.layers import RMSNorm
from bsa_compile.models.longcat.linear import Float32Linear
from bsa_compile.models.longcat.rope import rope_tables, rotate

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Recorder:
    """A dense `attention_fn` that keeps what it was called with."""

    def __init__(self, model):
        self.calls = []
        for module in model.modules():
            if isinstance(module, Attention):
                module.attention_fn = self

    def __call__(self, q, k, v, *, grid_q, grid_k, role):
        self.calls.append((role, grid_q, grid_k, q, k, v))
        return dense_attention(q, k, v, grid_q=grid_q, grid_k=grid_k, role=role)

    @property
    def sites(self):
        return [call[:3] for call in self.calls]


def encode(model, inputs, c, **changes):
    """The KV cache of the first c frames, as the pipeline makes it."""
    batch = inputs.hidden_states.shape[0]
    first = {"hidden_states": inputs.hidden_states[:, :, :c], "timestep": torch.zeros(batch, c)}
    return model(**inputs.kwargs(**first, return_kv=True, skip_crs_attn=True, **changes))[1]


def frame_times(inputs, c):
    """A timestep per latent frame, 0 on the first c."""
    times = inputs.timestep[:, None].repeat(1, inputs.hidden_states.shape[2])
    times[:, :c] = 0
    return times


# --- roles and grids that attention_fn is told ---


@pytest.mark.parametrize(
    ("changes", "sites"),
    [
        ({}, [("self", (5, 3, 5), (5, 3, 5))]),
        ({"return_kv": True}, [("cond", (5, 3, 5), (5, 3, 5))]),
        ({"num_cond_latents": 2}, [("cond", (2, 3, 5), (2, 3, 5)), ("noise", (3, 3, 5), (5, 3, 5))]),
        (
            {"num_cond_latents": 2, "return_kv": True},
            [("cond", (2, 3, 5), (2, 3, 5)), ("noise", (3, 3, 5), (5, 3, 5))],
        ),
        ({"num_cond_latents": 5}, [("cond", (5, 3, 5), (5, 3, 5))]),
    ],
    ids=["self", "encode", "cond", "cond-encode", "all-cond"],
)
@torch.no_grad()
def test_attention_sites(changes, sites):
    model = tiny_model()
    recorder = Recorder(model)
    model(**tiny_inputs().kwargs(**changes))
    assert recorder.sites == sites
    for _, grid_q, grid_k, q, k, v in recorder.calls:
        assert q.shape == (2, 2, grid_q[0] * grid_q[1] * grid_q[2], 16)
        assert k.shape == v.shape == (2, 2, grid_k[0] * grid_k[1] * grid_k[2], 16)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


@torch.no_grad()
def test_attention_site_with_cache():
    model, inputs = tiny_model(), tiny_inputs()
    cache = encode(model, inputs, 2)
    recorder = Recorder(model)
    new = {"hidden_states": inputs.hidden_states[:, :, 2:]}
    model(**inputs.kwargs(**new, num_cond_latents=2, kv_cache_dict=cache))
    assert recorder.sites == [("cached", (3, 3, 5), (5, 3, 5))]


@torch.no_grad()
def test_cond_and_noise_calls_get_views_not_copies():
    model = tiny_model()
    recorder = Recorder(model)
    model(**tiny_inputs().kwargs(num_cond_latents=2))
    (*_, q_c, k_c, v_c), (*_, q_n, k_n, v_n) = recorder.calls
    for cond, noise in ((q_c, q_n), (k_c, k_n), (v_c, v_n)):
        assert cond.untyped_storage().data_ptr() == noise.untyped_storage().data_ptr()
    assert v_n.untyped_storage().nbytes() == 3 * v_n.nbytes  # still a part of qkv


# --- conditioning frames ---


@torch.no_grad()
def test_cond_frames_depend_on_nothing_but_themselves():
    model, inputs = tiny_model(depth=2), tiny_inputs()
    c = 2
    base = inputs.kwargs(num_cond_latents=c, timestep=frame_times(inputs, c))
    out = model(**base)
    x = inputs.hidden_states.clone()
    x[:, :, c:] += 1
    other = model(**{**base, "hidden_states": x, "encoder_hidden_states": -inputs.encoder_hidden_states})
    assert torch.equal(out[:, :, :c], other[:, :, :c])
    assert relative_error(out[:, :, c:], other[:, :, c:]) > 1e-2
    x = inputs.hidden_states.clone()
    x[:, :, :c] += 1
    assert relative_error(out[:, :, c:], model(**{**base, "hidden_states": x})[:, :, c:]) > 1e-3


@torch.no_grad()
def test_all_frames_cond_is_the_call_without_text(monkeypatch):
    model, inputs = tiny_model(), tiny_inputs()
    with monkeypatch.context() as patch:
        patch.setattr(CrossAttention, "forward", None)  # no call over zero tokens
        out = model(**inputs.kwargs(num_cond_latents=5))
    assert torch.equal(out, model(**inputs.kwargs(skip_crs_attn=True)))
    assert relative_error(out, model(**inputs.kwargs())) > 1e-2


@pytest.mark.parametrize("c", [1, 4])
@torch.no_grad()
def test_cached_equals_uncached(model, io, c):
    x, y, mask = io["hidden_states"], io["encoder_hidden_states"], io["encoder_attention_mask"]
    times = io["timestep"][:, None].repeat(1, x.shape[2] + 1)
    x = torch.cat([x, x[:, :, :1] * 0.5], dim=2)  # 5 frames: at c = 4 one is left
    times[:, :c] = 0
    expected = model(x, times, y, mask, num_cond_latents=c)[:, :, c:]
    _, cache = model(x[:, :, :c], times[:, :c], y, mask, return_kv=True, skip_crs_attn=True)
    out = model(x[:, :, c:], times[:, c:], y, mask, num_cond_latents=c, kv_cache_dict=cache)
    assert relative_error(out, expected) < 1e-5
    without = model(x[:, :, c:], times[:, c:], y, mask)
    assert relative_error(without, expected) > 1e-3


@torch.no_grad()
def test_cache_of_batch_one_serves_a_larger_batch():
    model, inputs = tiny_model(), tiny_inputs()
    inputs.hidden_states[1, :, :2] = inputs.hidden_states[0, :, :2]
    both = encode(model, inputs, 2)
    one = {i: (k[:1], v[:1]) for i, (k, v) in both.items()}
    args = inputs.kwargs(hidden_states=inputs.hidden_states[:, :, 2:], num_cond_latents=2)
    assert relative_error(model(**args, kv_cache_dict=one), model(**args, kv_cache_dict=both)) < 1e-6


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_cache_keeps_nothing_else_alive(offload):
    for k, v in encode(tiny_model(depth=2), tiny_inputs(), 2, offload_kv_cache=offload).values():
        assert k.shape == v.shape == (2, 2, 2 * 3 * 5, 16)
        assert k.untyped_storage().nbytes() == k.nbytes
        assert v.untyped_storage().nbytes() == v.nbytes


@torch.no_grad()
def test_cache_of_another_dtype_is_cast():
    model, inputs = tiny_model(), tiny_inputs()
    cache = encode(model, inputs, 2)
    args = inputs.kwargs(hidden_states=inputs.hidden_states[:, :, 2:], num_cond_latents=2)
    wide = {i: (k.double(), v.double()) for i, (k, v) in cache.items()}
    assert torch.equal(model(**args, kv_cache_dict=wide), model(**args, kv_cache_dict=cache))


# --- text ---


@torch.no_grad()
def test_masked_text_equals_shorter_text():
    model, inputs = tiny_model(text_tokens_zero_pad=False), tiny_inputs()
    out = model(**inputs.kwargs())
    short = model(inputs.hidden_states[1:], inputs.timestep[1:], inputs.encoder_hidden_states[1:, :, :3], None)
    assert relative_error(out[1:], short) < 1e-6
    assert relative_error(model(**inputs.kwargs(encoder_attention_mask=None))[1:], short) > 1e-3


@torch.no_grad()
def test_zero_padded_text_counts_as_zeros():
    model, inputs = tiny_model(text_tokens_zero_pad=True), tiny_inputs()
    out = model(**inputs.kwargs())
    y = inputs.encoder_hidden_states.clone()
    y[1, :, 3:] = 100.0
    assert torch.equal(out, model(**inputs.kwargs(encoder_hidden_states=y)))
    dropped = tiny_model(text_tokens_zero_pad=False)(**inputs.kwargs())
    assert relative_error(out[:1], dropped[:1]) < 1e-6
    assert relative_error(out[1:], dropped[1:]) > 1e-3


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("zero_pad", [False, True])
@torch.no_grad()
def test_mask_dtypes_agree(mask_dtype, zero_pad):
    model, inputs = tiny_model(text_tokens_zero_pad=zero_pad).bfloat16(), tiny_inputs()
    out = model(**inputs.kwargs(encoder_attention_mask=inputs.encoder_attention_mask.to(mask_dtype)))
    assert torch.equal(out, model(**inputs.kwargs()))


def softmax_attention(q, k, v, attn_mask):
    """As in the definition: a row that the mask hides whole is NaN, as in some SDPA kernels."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("sdpa", [None, softmax_attention], ids=["torch", "nan-for-empty-rows"])
def test_sample_without_valid_text_gets_zero_from_attention(sdpa, monkeypatch):
    attn = CrossAttention(32, 2)
    x, text = torch.randn(2, 6, 32, requires_grad=True), torch.randn(2, 4, 32, requires_grad=True)
    valid = torch.tensor([[True, False, True, False], [False] * 4])
    alone = attn(x[:1], text[:1, ::2])
    if sdpa is not None:
        monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    out = attn(x, text, valid)
    assert torch.equal(out[1], attn.proj.bias.expand(6, 32))
    assert relative_error(out[:1], alone) < 1e-6
    grad_x, grad_text = torch.autograd.grad(out.square().sum(), (x, text))
    assert grad_x.isfinite().all()
    assert (grad_x[1] == 0).all()
    assert (grad_text[1] == 0).all()
    assert (grad_x[0] != 0).any()


@torch.no_grad()
def test_sample_does_not_see_another_samples_text():
    model, inputs = tiny_model(), tiny_inputs()
    y = inputs.encoder_hidden_states.clone()
    y[1] += 1
    out, other = model(**inputs.kwargs()), model(**inputs.kwargs(encoder_hidden_states=y))
    assert torch.equal(out[0], other[0])
    assert not torch.equal(out[1], other[1])


# --- shapes ---


@torch.no_grad()
def test_odd_height_and_width_are_padded_and_cropped():
    model, inputs = tiny_model(), tiny_inputs(grid=(3, 5, 9))
    out = model(**inputs.kwargs())
    padded = F.pad(inputs.hidden_states, (0, 1, 0, 1))
    assert out.shape == (2, 4, 3, 5, 9)
    assert torch.equal(out, model(**inputs.kwargs(hidden_states=padded))[..., :5, :9])


@torch.no_grad()
def test_channels_and_patch_of_another_config():
    model = tiny_model(out_channels=3, patch_size=(1, 3, 1))
    assert model(**tiny_inputs(grid=(2, 7, 3)).kwargs()).shape == (2, 3, 2, 7, 3)


@torch.no_grad()
def test_timestep_per_batch_is_timestep_of_every_frame():
    model, inputs = tiny_model(), tiny_inputs()
    out = model(**inputs.kwargs())
    assert torch.equal(out, model(**inputs.kwargs(timestep=frame_times(inputs, 0))))
    assert relative_error(model(**inputs.kwargs(timestep=frame_times(inputs, 1))), out) > 1e-3


# --- parts ---


def test_rope_turns_pairs_by_position():
    grid, dim = (3, 4, 5), 16  # 16 -> 8 + 4 + 4 dims for t, h, w
    x = torch.randn(1, 1, 60, dim)
    out = rotate(x, rope_tables(grid, dim, x.device))
    token = 2 * 20 + 1 * 5 + 3
    positions = [2, 2, 2, 2, 1, 1, 3, 3]
    exponents = [0, 2 / 8, 4 / 8, 6 / 8, 0, 2 / 4, 0, 2 / 4]
    angles = torch.tensor([p / 10000.0**e for p, e in zip(positions, exponents, strict=True)])
    pairs = torch.view_as_complex(x[0, 0, token].view(-1, 2)) * torch.polar(torch.ones(8), angles)
    torch.testing.assert_close(out[0, 0, token], torch.view_as_real(pairs).flatten())


def test_rope_of_head_dim_128_splits_44_42_42():
    cos, sin = rope_tables((2, 2, 2), 128, torch.device("cpu"))
    assert cos.shape == sin.shape == (8, 128)
    assert torch.equal(cos[:, ::2], cos[:, 1::2])
    assert torch.equal(sin[:, ::2], -sin[:, 1::2])
    turned = [(sin[1 << axis] != 0).nonzero().flatten() for axis in range(3)]  # tokens one step along w, h, t
    assert [(t.min().item(), t.max().item() + 1) for t in turned] == [(86, 128), (44, 86), (0, 44)]


def test_rms_norm_keeps_the_dtype_under_autocast():
    norm = RMSNorm(16)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), F.rms_norm(x.float(), (16,), eps=1e-6), rtol=2**-7, atol=0)


# --- precision ---


def test_float32_linear_ignores_weight_dtype_and_autocast():
    layer = Float32Linear(16, 8).bfloat16()
    x = torch.randn(4, 16)
    expected = F.linear(x, layer.weight.float(), layer.bias.float())
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


@torch.no_grad()
def test_bf16_is_close_to_fp32(model, io):
    args = (io["hidden_states"], io["timestep"], io["encoder_hidden_states"], io["encoder_attention_mask"])
    args = (args[0].bfloat16().float(), args[1], args[2].bfloat16().float(), args[3])
    half = model.bfloat16()
    out = half(*args)
    expected = LongCatVideoTransformer3DModel(model.config)
    expected.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    assert out.dtype == torch.float32
    # Two blocks of about ten roundings each, of 2^-9 relative on average, that add up as a random walk.
    assert 0 < relative_error(out, expected(*args)) < 20**0.5 * 2**-9


@torch.no_grad()
def test_bf16_model_rounds_the_timestep_but_not_its_embedding():
    model, inputs = tiny_model().bfloat16(), tiny_inputs()
    seen = []
    model.blocks[0].adaLN_modulation.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(**inputs.kwargs(timestep=torch.tensor([401.3, 598.7])))  # 8 bits: steps of 2 and of 4
    assert torch.equal(out, model(**inputs.kwargs(timestep=torch.tensor([402.0, 600.0]))))
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


@torch.no_grad()
def test_bf16_final_layer_is_not_rounded():
    out = tiny_model().bfloat16()(**tiny_inputs().kwargs())
    assert not torch.equal(out, out.bfloat16().float())


@torch.no_grad()
def test_autocast_is_close_to_fp32_and_attention_gets_one_dtype():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs.kwargs())
    recorder = Recorder(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs.kwargs())
    assert out.dtype == torch.float32
    assert 0 < relative_error(out, expected) < 20**0.5 * 2**-8
    assert {x.dtype for call in recorder.calls for x in call[3:]} == {torch.bfloat16}


# --- meta ---


@torch.no_grad()
def test_meta_construction_has_no_state_but_parameters():
    with torch.device("meta"):
        model = tiny_model(depth=2)
    assert all(p.is_meta for p in model.parameters())
    assert list(model.buffers()) == []
    source, inputs = tiny_model(depth=2), tiny_inputs()
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(**inputs.kwargs()), source(**inputs.kwargs()))


# --- gradients ---


def gradients(model, inputs, **changes):
    model.zero_grad()
    x = inputs.hidden_states.clone().requires_grad_()
    model(**inputs.kwargs(hidden_states=x, **changes)).square().mean().backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("c", [0, 2])
def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(c):
    model, inputs = tiny_model(depth=2), tiny_inputs()
    recorder = Recorder(model)
    expected = gradients(model, inputs, num_cond_latents=c)
    plain_calls = len(recorder.calls)
    model.enable_gradient_checkpointing()
    recorder.calls.clear()
    got = gradients(model, inputs, num_cond_latents=c)
    assert len(recorder.calls) == 2 * plain_calls
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
        assert grad.abs().max() > 0, name
    model.disable_gradient_checkpointing()
    recorder.calls.clear()
    gradients(model, inputs, num_cond_latents=c)
    assert len(recorder.calls) == plain_calls


def test_gradient_checkpointing_returns_the_cache():
    model, inputs = tiny_model(), tiny_inputs()
    out, kv = model(**inputs.kwargs(return_kv=True))
    model.enable_gradient_checkpointing()
    again, kv_again = model(**inputs.kwargs(return_kv=True))
    assert torch.equal(out, again)
    assert torch.equal(kv[0][1], kv_again[0][1])


# --- the request for block-sparse attention ---


@pytest.mark.parametrize(("in_config", "initial"), [(True, True), (False, None)])
def test_request_starts_from_the_config(in_config, initial):
    params = {"sparsity": 0.9375}
    model = tiny_model(enable_bsa=in_config, bsa_params=params)
    assert model.bsa_enabled is initial
    assert model.bsa_params == params
    model.disable_bsa()
    assert model.bsa_enabled is False
    model.enable_bsa()
    assert model.bsa_enabled is True


@pytest.mark.filterwarnings("default::UserWarning")
@torch.no_grad()
def test_unfulfilled_request_warns_once_per_model():
    inputs = tiny_inputs()
    for _ in range(2):
        model = tiny_model()
        model(**inputs.kwargs())
        model.enable_bsa()
        with pytest.warns(UserWarning, match=r"attention ran dense.*bsa_compile\.optimize") as record:
            model(**inputs.kwargs())
        assert record[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs.kwargs())


@torch.no_grad()
def test_fulfilled_request_does_not_warn():
    model = tiny_model(depth=2)
    model.enable_bsa()
    model.blocks[1].attn.attention_fn = lambda q, k, v, **where: dense_attention(q, k, v, **where)
    model(**tiny_inputs().kwargs())
