"""torch.compile and torch.export of the model: one graph, the same numbers, and recompiled when it must be."""

from __future__ import annotations

import pytest
import torch
from longcat_cases import relative_error, tiny_inputs, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from bsa_compile.errors import InputError
from bsa_compile.models.longcat import dense_attention

pytestmark = pytest.mark.filterwarnings("error:enable_bsa was asked for")

CASES = ["zero-pad", "drop", "cond", "encode", "cached", "offloaded"]


def case(name):
    """Model and keyword arguments of one way to call it."""
    model = tiny_model(text_tokens_zero_pad=name != "drop")
    inputs = tiny_inputs()
    if name == "cond":
        return model, inputs.kwargs(num_cond_latents=2)
    if name == "encode":
        return model, inputs.kwargs(return_kv=True, skip_crs_attn=True)
    if name == "offloaded":
        return model, inputs.kwargs(return_kv=True, offload_kv_cache=True)
    if name == "cached":
        x = inputs.hidden_states
        with torch.no_grad():
            encode = inputs.kwargs(hidden_states=x[:, :, :2], return_kv=True, skip_crs_attn=True)
            cache = {i: (k[:1], v[:1]) for i, (k, v) in model(**encode)[1].items()}
        return model, inputs.kwargs(hidden_states=x[:, :, 2:], num_cond_latents=2, kv_cache_dict=cache)
    return model, inputs.kwargs()


def tensors(result):
    """The output and, where it was asked for, every k and v."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [result[0], *(x for i in sorted(result[1]) for x in result[1][i])]


def assert_same(got, expected, bound=1e-6):
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < bound


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_compiles_to_one_graph(name):
    model, kwargs = case(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same(compiled(**kwargs), model(**kwargs))
    assert counter.frame_count == 1
    sites = [n for g in counter.graphs for n in g.graph.nodes if n.target is torch._C._nn.scaled_dot_product_attention]
    per_block = {"cond": 3, "encode": 1}.get(name, 2)  # self-attention, cond's second call, cross-attention
    assert len(sites) == per_block


@pytest.mark.slow
@torch.no_grad()
def test_inductor():
    model = tiny_model(text_tokens_zero_pad=False)
    kwargs = tiny_inputs(grid=(3, 4, 6)).kwargs(num_cond_latents=1)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(**kwargs), model(**kwargs), bound=1e-5)


@torch.no_grad()
def test_autocast_compiles_to_one_graph():
    model, kwargs = case("drop")
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(compiled(**kwargs), model(**kwargs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_gradients(checkpointing):
    model, kwargs = case("cond")
    model(**kwargs).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(model, fullgraph=True, backend=counter)(**kwargs).square().mean().backward()
    regions = [n for g in counter.graphs for n in g.graph.nodes if "checkpoint" in str(n.target)]
    assert len(regions) == int(checkpointing)
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) < 1e-4, name


@pytest.mark.slow
@torch.no_grad()
def test_dynamic_sizes_compile_once():
    model = tiny_model(text_tokens_zero_pad=False)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for grid, text in (((5, 6, 18), 7), ((3, 10, 14), 9), ((8, 14, 22), 12)):
        kwargs = tiny_inputs(grid=grid, text=text).kwargs()
        assert_same(compiled(**kwargs), model(**kwargs))
    assert counter.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_sizes_given_one_after_another():
    """The default of torch.compile: static first, then dynamic; here two grids of the same number of tokens."""
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    for grid, c in (((5, 6, 10), 1), ((5, 10, 6), 2)):
        kwargs = tiny_inputs(grid=grid).kwargs(num_cond_latents=c)
        assert_same(compiled(**kwargs), model(**kwargs))


@torch.no_grad()
def test_replacing_attention_fn_is_seen_by_compiled_code():
    def doubled(q, k, v, *, grid_q, grid_k, role):
        return 2 * dense_attention(q, k, v, grid_q=grid_q, grid_k=grid_k, role=role)

    model, kwargs = case("zero-pad")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    dense = compiled(**kwargs)
    model.blocks[0].attn.attention_fn = doubled
    out = compiled(**kwargs)
    assert_same(out, model(**kwargs))
    assert relative_error(out, dense) > 1e-2


@torch.no_grad()
def test_switching_bsa_recompiles_and_switching_back_does_not():
    model, kwargs = case("zero-pad")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    for switch in (lambda: None, model.enable_bsa, model.disable_bsa, model.enable_bsa):
        switch()
        compiled(**kwargs)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3]


def test_bad_input_is_refused_by_the_compiled_model():
    model, kwargs = case("zero-pad")
    kwargs["encoder_attention_mask"] = torch.ones(2, 3)
    with pytest.raises(InputError, match="encoder_attention_mask must have shape"):
        torch.compile(model, backend="eager")(**kwargs)
    torch._dynamo.reset()
    # With fullgraph, dynamo wraps what the traced code raised, the text is still there.
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"InputError.*encoder_attention_mask must have shape"):
        torch.compile(model, backend="eager", fullgraph=True)(**kwargs)


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in CASES), ("drop", True), ("encode", True), ("cached", True)]
)
@torch.no_grad()
def test_exports(name, strict):
    model, kwargs = case(name)
    program = torch.export.export(model, (), kwargs, strict=strict)
    assert_same(program.module()(**kwargs), model(**kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@torch.no_grad()
def test_exports_with_dynamic_sizes(strict):
    model = tiny_model(text_tokens_zero_pad=False)
    text = Dim("text", min=2, max=512)
    frames, rows, columns = Dim("frames", min=2, max=96), Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    shapes = {
        "hidden_states": {2: frames, 3: 2 * rows, 4: 2 * columns},
        "timestep": None,
        "encoder_hidden_states": {2: text},
        "encoder_attention_mask": {1: text},
    }
    program = torch.export.export(model, (), tiny_inputs().kwargs(), dynamic_shapes=shapes, strict=strict)
    for grid, length in (((3, 8, 4), 4), ((9, 4, 14), 11)):
        kwargs = tiny_inputs(grid=grid, text=length).kwargs()
        assert_same(program.module()(**kwargs), model(**kwargs))
