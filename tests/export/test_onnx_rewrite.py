"""ONNX files made by others: which attention is found, what becomes of it, and that nothing else changes."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bsa_compile
from bsa_compile import reference
from bsa_compile.errors import GridError, SiteError, UsageError
from bsa_compile.exporting.onnx_rewrite import rewrite_onnx
from bsa_compile.grid import TokenGrid
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy, Rule
from bsa_compile.report import Report

from .support import call, tensors

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CHECKPOINT = Path(bsa_compile.__file__).parent / "data" / "tiny_longcat"
GRID, TILE = (2, 3, 4), (2, 2, 2)  # partial tiles in h
TOKENS, HEADS, DIM, BATCH = 24, 2, 16, 2
WIDTH = HEADS * DIM
ALL = BSAPolicy(sparsity=0.0, chunk_3d_shape_q=TILE, chunk_3d_shape_k=TILE)
FEW = BSAPolicy(sparsity=0.75, chunk_3d_shape_q=TILE, chunk_3d_shape_k=TILE)
NODE = "GatedBlockSparseAttention"


X = f"float[{BATCH},{TOKENS},{WIDTH}] x"


class Graph:
    """Collects operators in onnx's textual form; every call gives the name of a new value."""

    def __init__(self, inputs: str = X, opset: int = 20) -> None:
        self.inputs, self.opset = inputs, opset
        self.lines: list[str] = []
        self.constants: dict[str, np.ndarray] = {}
        self.functions: list[Any] = []
        self.generator = np.random.default_rng(0)

    def __call__(self, expression: str, outputs: int = 1) -> Any:
        names = [f"v{len(self.lines)}_{i}" for i in range(outputs)]
        self.lines.append(f"{', '.join(names)} = {expression}")
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def weight(self, *shape: int) -> str:
        return self.constant(self.generator.standard_normal(shape) / np.sqrt(shape[0]))

    def project(self, x: str = "x", width: int = WIDTH) -> str:
        return self(f"MatMul({x}, {self.weight(WIDTH, width)})")

    def heads(self, x: str = "x", heads: int = HEADS, tokens: int = TOKENS) -> str:
        """`[B, heads, S, DIM]` of a projection of x."""
        split = self(f"Reshape({self.project(x, heads * DIM)}, {self.ints(0, tokens, heads, DIM)})")
        return self(f"Transpose<perm = [0, 2, 1, 3]>({split})")

    def scores(self, q: str, k: str) -> str:
        turned = self(f"Transpose<perm = [0, 1, 3, 2]>({k})")
        return self(f"MatMul({q}, {turned})")

    def weighted(self, scores: str, v: str, axis: int = -1) -> str:
        weights = self(f"Softmax<axis = {axis}>({scores})")
        return self(f"MatMul({weights}, {v})")

    def softmax(self, q: str, k: str, v: str, scale: float = DIM**-0.5) -> str:
        """Written-out attention."""
        scaled = self(f"Mul({self.scores(q, k)}, {self.constant(scale)})")
        return self.weighted(scaled, v)

    def model(self, *outputs: str, scope: str = "/blocks.0/attn") -> Any:
        """The model with these outputs, its nodes named as TorchScript's exporter does."""
        results = ", ".join(f"float[N] {name}" for name in outputs)
        body = "\n".join(self.lines)
        text = f'<ir_version: 10, opset_import: ["": {self.opset}, "com.microsoft": 1, "mine": 1]> '
        model = onnx.parser.parse_model(f"{text} main ({self.inputs}) => ({results}) {{ {body} }}")
        model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in self.constants.items())
        model.functions.extend(self.functions)
        for i, node in enumerate(model.graph.node):
            node.name = f"{scope}/{node.op_type}_{i}"
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(model)
        for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(known)
        return model


def rewritten(tmp_path: Path, model: Any, policy: BSAPolicy = ALL, grid: Any = GRID) -> tuple[Any, Report]:
    """Write, rewrite, check and read."""
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(model, before)
    report = rewrite_onnx(before, after, policy, grid)
    result = onnx.load(after)
    onnx.checker.check_model(result, full_check=True)
    return result, report


def ops(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: Any, **inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of onnxruntime on a CPU; inputs that are not given are drawn."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(1)
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else BATCH for size in item.shape]
        dtype = np.float16 if "float16" in item.type else np.float32
        inputs.setdefault(item.name, generator.standard_normal(shape).astype(dtype))
    return session.run(None, inputs)


def assert_same(model: Any, other: Any) -> None:
    for before, after in zip(run(model), run(other), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def assert_sparse(tmp_path: Path, graph: Graph, qkv: tuple[str, str, str], out: str, **kwargs: Any) -> Report:
    """The rewritten graph gives, from 4-D q, k, v and as `[B, H, S, D]`, what the reference says."""
    result, report = rewritten(tmp_path, graph.model(out), FEW)
    assert [s.rewritten for s in report.sites] == [True], report
    q, k, v = (torch.from_numpy(x) for x in run(graph.model(*qkv)))
    expected, _ = reference.block_sparse_attention(
        q, k, v, grid_q=GRID, grid_k=GRID, tile_q=TILE, tile_k=TILE, sparsity=0.75, **kwargs
    )
    np.testing.assert_allclose(run(result)[0], expected.numpy(), rtol=1e-5, atol=1e-5)
    return report


def reason(report: Report) -> str:
    assert len(report.sites) == 1, report
    return report.sites[0].reason


# -- patterns ---------------------------------------------------------------------------------------------------------


def test_written_out_attention_becomes_one_node(tmp_path):
    graph = Graph()
    qkv = tuple(graph.heads() for _ in range(3))
    model = graph.model(graph.softmax(*qkv))
    result, report = rewritten(tmp_path, model)
    assert ops(result).count(NODE) == 1
    assert not {"Softmax", "Mul"} & set(ops(result))
    assert ops(result).count("Transpose") == 3, "the transposition of the keys is gone"
    assert [(o.domain, o.version) for o in result.opset_import if o.domain == "ai.bsa"] == [("ai.bsa", 1)]
    site = report.sites[0]
    assert (site.module, site.role, site.op, site.grid_q) == ("blocks.0.attn", "self", "MatMul-Softmax-MatMul", GRID)
    assert (site.batch, site.heads, site.head_dim, site.tokens_q) == (BATCH, HEADS, DIM, TOKENS)
    assert site.source in [node.name for node in model.graph.node]
    assert_same(model, result)


def test_written_out_attention_selects_as_the_reference(tmp_path):
    graph = Graph()
    qkv = graph.heads(), graph.heads(), graph.heads()
    assert_sparse(tmp_path, graph, qkv, graph.softmax(*qkv))


def test_another_scale_than_the_default(tmp_path):
    graph = Graph()
    qkv = graph.heads(), graph.heads(), graph.heads()
    result, _ = rewritten(tmp_path, graph.model(out := graph.softmax(*qkv, scale=0.5)))
    node = next(n for n in result.graph.node if n.op_type == NODE)
    assert {a.name: a.f for a in node.attribute}["scale"] == 0.5
    assert_sparse(tmp_path, graph, qkv, out, scale=0.5)


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_every_opset_of_the_function(tmp_path, opset):
    graph = Graph(opset=opset)
    model = graph.model(graph.softmax(graph.heads(), graph.heads(), graph.heads()))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    assert {o.domain: o.version for o in result.opset_import}[""] == opset
    assert_same(model, result)


@pytest.mark.parametrize("opset", [18, 19])
def test_older_opsets_are_converted(tmp_path, opset):
    graph = Graph(opset=opset)
    model = graph.model(graph.softmax(graph.heads(), graph.heads(), graph.heads()))
    result, report = rewritten(tmp_path, model)
    assert {o.domain: o.version for o in result.opset_import}[""] == 20
    assert any(f"opset {opset} to 20" in note for note in report.notes)
    assert_same(model, result)


@settings(max_examples=25)
@given(data=st.data())
def test_variants_of_written_out_attention(tmp_path_factory, data):
    draw = data.draw
    graph = Graph()
    rank = draw(st.sampled_from([3, 4]), label="rank")
    where = draw(
        st.sampled_from(["scores", "divided", "q", "k", "k transposed", "both", "before", "none"]), label="scale"
    )
    turned = draw(st.sampled_from(["in place", "folded", "three", "einsum"]), label="keys")
    if rank == 3:
        turned = "in place"
    q, plain_k, v = graph.heads(), graph.heads(), graph.heads()
    k = plain_k
    if rank == 3:
        q, k, v = (graph(f"Reshape({x}, {graph.ints(BATCH * HEADS, TOKENS, DIM)})") for x in (q, k, v))
    root, whole = graph.constant([DIM**-0.25]), graph.constant(DIM**-0.5)
    if where in ("q", "both"):
        q = graph(f"Mul({q}, {root if where == 'both' else whole})")
    if where == "before":
        q = graph(f"Div({q}, {graph.constant(DIM**0.5)})")
    if where == "k" or (where == "both" and turned == "einsum"):
        k = graph(f"Mul({whole if where == 'k' else root}, {k})")
    if turned == "einsum":
        scores = graph(f'Einsum<equation = "bhid, bhjd -> bhij">({q}, {k})')
    else:
        if turned == "three":
            three = graph(f"Reshape({k}, {graph.ints(-1, TOKENS, DIM)})")
            three = graph(f"Transpose<perm = [0, 2, 1]>({three})")
            k = graph(f"Reshape({three}, {graph.ints(BATCH, HEADS, DIM, TOKENS)})")
        elif turned == "folded":
            by_token = graph(f"Transpose<perm = [0, 2, 1, 3]>({k})")
            k = graph(f"Transpose<perm = [0, 2, 3, 1]>({by_token})")
        else:
            k = graph(f"Transpose<perm = {[0, 1, 3, 2] if rank == 4 else [0, 2, 1]}>({k})")
        if where in ("k transposed", "both"):
            k = graph(f"Mul({k}, {root if where == 'both' else whole})")
        scores = graph(f"MatMul({q}, {k})")
    if where == "scores":
        scores = graph(f"Mul({whole}, {scores})")
    if where == "divided":
        scores = graph(f"Div({scores}, {graph.constant([DIM**0.5])})")
    if draw(st.booleans(), label="stable"):
        highest = graph(f"ReduceMax({scores}, {graph.ints(-1)})")
        scores = graph(f"Sub({scores}, {highest})")
    if draw(st.booleans(), label="cast"):
        scores = graph(f"Cast<to = 1>({scores})")
    weights = graph(f"Softmax<axis = {draw(st.sampled_from([-1, rank - 1]), label='axis')}>({scores})")
    if draw(st.booleans(), label="guarded"):
        missing = graph(f"IsNaN({weights})")
        weights = graph(f"Where({missing}, {graph.constant(0)}, {weights})")
    if draw(st.booleans(), label="dropout"):
        weights = graph(f"Dropout({weights})")
    if rank == 4 and draw(st.booleans(), label="einsum of values"):
        out = graph(f'Einsum<equation = "bhij,bhjd->bihd">({weights}, {v})')
    else:
        out = graph(f"MatMul({weights}, {v})")
    model = graph.model(out)
    result, report = rewritten(tmp_path_factory.mktemp("variants"), model)
    expect_default_scale = where not in ("none",) and not (where == "k transposed" and turned == "einsum")
    assert [s.rewritten for s in report.sites] == [True], f"{report}\n" + "\n".join(graph.lines)
    assert not {"Softmax", "Mul", "Div", "ReduceMax"} & set(ops(result))
    node = next(n for n in result.graph.node if n.op_type == NODE)
    scale = {a.name: a.f for a in node.attribute}["scale"]
    assert scale == pytest.approx(DIM**-0.5 if expect_default_scale else 1.0)
    assert_same(model, result)


def attention(graph: Graph, q: str, k: str, v: str, attributes: str = "", outputs: int = 1, **more: str) -> Any:
    names = ("mask", "past_key", "past_value")
    extra = "".join(f", {more.get(n, '')}" for n in names) if more else ""
    with_attributes = f"<{attributes}>" if attributes else ""
    return graph(f"Attention{with_attributes}({q}, {k}, {v}{extra})", outputs)


def test_attention_node(tmp_path):
    graph = Graph(opset=23)
    qkv = graph.heads(), graph.heads(), graph.heads()
    model = graph.model(out := attention(graph, *qkv, "scale = 0.3"))
    result, report = rewritten(tmp_path, model)
    assert "Attention" not in ops(result)
    assert report.sites[0].op == "Attention"
    assert_same(model, result)
    assert_sparse(tmp_path, graph, qkv, out, scale=float(np.float32(0.3)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_node_of_three_dimensions(tmp_path, kv_heads):
    heads = 4
    graph = Graph(opset=23, inputs=f"float[B,{TOKENS},{WIDTH}] x")
    q, k, v = (graph.project(width=n * DIM) for n in (heads, kv_heads, kv_heads))
    attributes = f"q_num_heads = {heads}, kv_num_heads = {kv_heads}"
    out = attention(graph, q, k, v, attributes)
    model = graph.model(out)
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    assert (report.sites[0].batch, report.sites[0].heads) == ("B", heads)
    assert_same(model, result)


def test_attention_node_with_shared_key_heads(tmp_path):
    graph = Graph(opset=23)
    qkv = graph.heads(heads=4), graph.heads(heads=2), graph.heads(heads=2)
    assert_sparse(tmp_path, graph, qkv, attention(graph, *qkv))


def test_repeated_key_heads_are_taken_once(tmp_path):
    graph = Graph()
    q, k, v = graph.heads(heads=4), graph.heads(heads=2), graph.heads(heads=2)

    def repeated(x: str) -> str:
        wide = graph(f"Unsqueeze({x}, {graph.ints(2)})")
        wide = graph(f"Expand({wide}, {graph.ints(BATCH, 2, 2, TOKENS, DIM)})")
        return graph(f"Reshape({wide}, {graph.ints(BATCH, 4, TOKENS, DIM)})")

    out = graph.softmax(q, repeated(k), repeated(v))
    result, _ = rewritten(tmp_path, graph.model(out))
    assert "Expand" not in ops(result)
    assert_same(graph.model(out), result)
    assert_sparse(tmp_path, graph, (q, k, v), out)


def test_half_precision_with_a_softmax_in_single(tmp_path):
    graph = Graph()
    half = [graph(f"Cast<to = 10>({graph.heads()})") for _ in range(3)]
    q, k = (graph(f"Cast<to = 1>({h})") for h in half[:2])
    scores = graph.scores(q, k)
    scaled = graph(f"Mul({scores}, {graph.constant(0.25)})")
    weights = graph(f"Softmax({scaled})")
    weights = graph(f"Cast<to = 10>({weights})")
    out = graph(f"MatMul({weights}, {half[2]})")
    model = graph.model(graph(f"Cast<to = 1>({out})"))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    np.testing.assert_allclose(run(result)[0], run(model)[0], rtol=2e-3, atol=2e-3)


def test_values_of_another_type_are_cast_around_the_node(tmp_path):
    graph = Graph()
    q, k = graph.heads(), graph.heads()
    v = graph(f"Cast<to = 10>({graph.heads()})")
    scores = graph.scores(q, k)
    weights = graph(f"Softmax({scores})")
    weights = graph(f"Cast<to = 10>({weights})")
    out = graph(f"MatMul({weights}, {v})")
    model = graph.model(graph(f"Cast<to = 1>({out})"))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    np.testing.assert_allclose(run(result)[0], run(model)[0], rtol=2e-3, atol=2e-3)


def test_bfloat16_passes_the_checker(tmp_path):
    graph = Graph(inputs=X.replace("float[", "bfloat16["))
    weights = [graph(f"Cast<to = 16>({graph.weight(WIDTH, WIDTH)})") for _ in range(3)]
    split = [graph(f"Reshape({graph(f'MatMul(x, {w})')}, {graph.ints(0, TOKENS, HEADS, DIM)})") for w in weights]
    q, k, v = (graph(f"Transpose<perm = [0, 2, 1, 3]>({s})") for s in split)
    out = graph.weighted(graph.scores(q, k), v)
    model = graph.model(out)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(out, 16, [BATCH, HEADS, TOKENS, DIM]))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    assert NODE in ops(result)


def test_attention_of_attention(tmp_path):
    """The second's queries are the very output of the first."""
    graph = Graph()
    first = graph.softmax(graph.heads(), graph.heads(), graph.heads())
    model = graph.model(graph.softmax(first, graph.heads(), first))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 2
    assert_same(model, result)


# -- what stays dense -------------------------------------------------------------------------------------------------


def dense(tmp_path: Path, model: Any, policy: BSAPolicy = ALL) -> Report:
    """Nothing is rewritten, and the file is the same bit for bit."""
    _, report = rewritten(tmp_path, model, policy)
    assert not report.rewritten, report
    assert (tmp_path / "after.onnx").read_bytes() == (tmp_path / "before.onnx").read_bytes()
    return report


@pytest.mark.parametrize("opset", [20, 23])
def test_cross_attention_over_equally_many_tokens_stays_dense(tmp_path, opset):
    shape = f"float[{BATCH},{TOKENS},{WIDTH}]"
    graph = Graph(inputs=f"{shape} x, {shape} text", opset=opset)
    q, k, v = graph.heads("x"), graph.heads("text"), graph.heads("text")
    out = graph.softmax(q, k, v) if opset == 20 else attention(graph, q, k, v)
    report = dense(tmp_path, graph.model(out))
    assert (reason(report), report.sites[0].role) == ("cross_attention", "cross")
    assert dense(tmp_path, graph.model(out), BSAPolicy(on_unsupported="error")).sites == report.sites


def test_text_mixed_into_the_keys_stays_dense(tmp_path):
    shape = f"float[{BATCH},{TOKENS},{WIDTH}]"
    graph = Graph(inputs=f"{shape} x, float[{BATCH},8,{WIDTH}] text")
    both = graph("Concat<axis = 1>(x, text)")
    k, v = (graph.heads(both, tokens=TOKENS + 8) for _ in range(2))
    assert reason(dense(tmp_path, graph.model(graph.softmax(graph.heads(), k, v)))) == "mixed_sequence"


def test_shuffled_tokens_stay_dense(tmp_path):
    graph = Graph()
    order = np.random.default_rng(0).permutation(TOKENS)
    shuffled = graph(f"Gather<axis = 1>(x, {graph.ints(*order)})")
    report = dense(tmp_path, graph.model(graph.softmax(*(graph.heads(shuffled) for _ in range(3)))))
    assert reason(report) == "unknown_grid"
    assert "order of the" in report.sites[0].detail


def test_attention_within_frames_stays_dense(tmp_path):
    graph = Graph()
    frames = graph(f"Reshape(x, {graph.ints(BATCH * 2, TOKENS // 2, WIDTH)})")
    qkv = (graph.heads(frames, tokens=TOKENS // 2) for _ in range(3))
    assert reason(dense(tmp_path, graph.model(graph.softmax(*qkv)))) == "unknown_grid"


def test_queries_and_keys_given_as_inputs_stay_dense(tmp_path):
    shape = f"float[{BATCH},{HEADS},{TOKENS},{DIM}]"
    graph = Graph(inputs=f"{shape} q, {shape} k, {shape} v")
    assert not dense(tmp_path, graph.model(graph.softmax("q", "k", "v"))).rewritten


@pytest.mark.parametrize(
    ("wanted", "attributes", "more"),
    [
        ("causal", "is_causal = 1", {}),
        ("variant", "softcap = 20.0", {}),
        ("mask", "", {"mask": "mask"}),
        ("variant", "", {"past_key": "past", "past_value": "past"}),
    ],
)
def test_attention_nodes_that_have_no_block_sparse_form(tmp_path, wanted, attributes, more):
    past = f"float[{BATCH},{HEADS},0,{DIM}] past"
    graph = Graph(f"{X}, float[{TOKENS},{TOKENS}] mask, {past}", opset=23)
    outputs = 3 if "past_key" in more else 1
    out = attention(graph, graph.heads(), graph.heads(), graph.heads(), attributes, outputs, **more)
    report = dense(tmp_path, graph.model(*([out] if outputs == 1 else out)))
    assert reason(report) == wanted


def test_attention_whose_scores_are_an_output_stays_dense(tmp_path):
    graph = Graph(opset=23)
    out, _, _, scores = attention(graph, graph.heads(), graph.heads(), graph.heads(), "", 4)
    report = dense(tmp_path, graph.model(out, scores))
    assert (reason(report), "qk_matmul_output" in report.sites[0].detail) == ("variant", True)


@pytest.mark.parametrize(
    ("wanted", "form"),
    [
        ("mask", "Add({}, mask)"),
        ("mask", "Add(mask, {})"),
        ("mask", "Where(allowed, {}, low)"),
        ("variant", "Tanh({})"),
        ("variant", "Mul({}, mask)"),
    ],
)
def test_what_happens_to_scores_has_no_block_sparse_form(tmp_path, wanted, form):
    square = f"[{TOKENS},{TOKENS}]"
    graph = Graph(f"{X}, float{square} mask, bool{square} allowed, float low")
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    scores = graph.scores(q, k)
    assert reason(dense(tmp_path, graph.model(graph.weighted(graph(form.format(scores)), v)))) == wanted


def test_weights_used_elsewhere_keep_attention_dense(tmp_path):
    graph = Graph()
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    weights = graph(f"Softmax({graph.scores(q, k)})")
    report = dense(tmp_path, graph.model(graph(f"MatMul({weights}, {v})"), weights))
    assert (reason(report), report.sites[0].detail) == ("variant", "attention_weights=used")


def test_softmax_over_queries_is_no_attention_to_rewrite(tmp_path):
    graph = Graph()
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    scores = graph.scores(q, k)
    model = graph.model(graph.weighted(scores, v, axis=2))
    assert reason(dense(tmp_path, model)) == "opaque"


def test_operators_of_other_domains_are_reported(tmp_path):
    graph = Graph()
    q, k, v = graph.project(), graph.project(), graph.project()
    out = graph(f"com.microsoft.MultiHeadAttention<num_heads = {HEADS}>({q}, {k}, {v})")
    before, after = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(graph.model(out), before)
    site = rewrite_onnx(before, after, ALL, GRID).sites[0]
    assert (site.reason, site.op, site.role) == ("opaque", "com.microsoft::MultiHeadAttention", "self")


@pytest.mark.parametrize(
    "form",
    [
        "m = ReduceMax<keepdims = 1>({s}, {last}) d = Sub({s}, m) e = Exp(d) z = ReduceSum<keepdims = 1>(e, {last})"
        " p = Div(e, z) out = MatMul(p, {v})",
        "e = Exp({s}) z = ReduceSum<keepdims = 1>(e, {last}) o = MatMul(e, {v}) out = Div(o, z)",
        "p = Sigmoid({s}) out = MatMul(p, {v})",
        "g = com.microsoft.QuickGelu({s}) p = Softmax<axis = -1>(g) out = MatMul(p, {v})",
        "p = Softmax<axis = -1>({s}) out = com.microsoft.FusedMatMul(p, {v})",
    ],
    ids=["exp-sum-div", "late division", "sigmoid", "operator of others between", "product of others"],
)
def test_attention_in_a_form_that_is_not_understood_is_named(tmp_path, form):
    graph = Graph()
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    names = {"s": graph.scores(q, k), "v": v, "last": graph.ints(3)}
    graph.lines.append(form.format(**names))
    before, after = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(graph.model("out"), before)
    report = rewrite_onnx(before, after, ALL, GRID)
    assert [site.reason for site in report.sites] == ["opaque"]
    assert report.sites[0].op.endswith("MatMul")
    assert after.read_bytes() == before.read_bytes()


@pytest.mark.parametrize(("dim", "wanted"), [(12, "head_dim"), (8, "head_dim")])
def test_head_sizes_that_kernels_lack(tmp_path, dim, wanted):
    graph = Graph()
    projected = [graph.project(width=HEADS * dim) for _ in range(3)]
    split = [graph(f"Reshape({p}, {graph.ints(0, TOKENS, HEADS, dim)})") for p in projected]
    q, k, v = (graph(f"Transpose<perm = [0, 2, 1, 3]>({s})") for s in split)
    assert reason(dense(tmp_path, graph.model(graph.softmax(q, k, v)))) == wanted


def test_double_precision_stays_dense(tmp_path):
    graph = Graph()
    q, k, v = (graph(f"Cast<to = 11>({graph.heads()})") for _ in range(3))
    scores = graph.scores(q, k)
    assert reason(dense(tmp_path, graph.model(graph(f"Cast<to = 1>({graph.weighted(scores, v)})")))) == "dtype"


def test_an_image_stays_dense(tmp_path):
    graph = Graph()
    model = graph.model(graph.softmax(graph.heads(), graph.heads(), graph.heads()))
    assert reason(rewritten(tmp_path, model, ALL, (1, 4, 6))[1]) == "image"


# -- the policy -------------------------------------------------------------------------------------------------------


def blocks(count: int = 2) -> Any:
    """Blocks of attention one after the other, their nodes named by block."""
    graph = Graph()
    x, ends = "x", [0]
    for _ in range(count):
        out = graph.softmax(graph.heads(x), graph.heads(x), graph.heads(x))
        back = graph(f"Transpose<perm = [0, 2, 1, 3]>({out})")
        merged = graph(f"Reshape({back}, {graph.ints(0, TOKENS, WIDTH)})")
        x = graph(f"Add({x}, {merged})")
        ends.append(len(graph.lines))
    model = graph.model(x)
    for i in range(count):
        for node in model.graph.node[ends[i] : ends[i + 1]]:
            node.name = node.name.replace("/blocks.0/", f"/blocks.{i}/")
    return model


def test_rules_go_by_module_path(tmp_path):
    policy = BSAPolicy(
        sparsity=0.0,
        chunk_3d_shape_q=TILE,
        chunk_3d_shape_k=TILE,
        rules=(Rule(module="blocks.1.*", dense=True), Rule(module="blocks.2.attn", sparsity=0.5)),
    )
    model = blocks(3)
    result, report = rewritten(tmp_path, model, policy)
    assert [(s.module, s.reason, s.sparsity) for s in report.sites] == [
        ("blocks.0.attn", "rewritten", 0.0),
        ("blocks.1.attn", "rule", None),
        ("blocks.2.attn", "rewritten", 0.5),
    ]
    assert (ops(result).count(NODE), ops(result).count("Softmax")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"enabled": False}, "disabled"),
        ({"min_tokens": 25}, "min_tokens"),
        ({"min_tokens": 24}, "rewritten"),
        ({"rules": (Rule(resolution=(None, 48), dense=True),)}, "rewritten"),
        ({"rules": (Rule(resolution=(48, None), dense=True),)}, "rule"),
        ({"rules": (Rule(role="cond", dense=True),)}, "rewritten"),
    ],
)
def test_the_policy_decides(tmp_path, change, wanted):
    assert reason(rewritten(tmp_path, blocks(1), BSAPolicy(**change))[1]) == wanted


def test_rules_by_step_never_match_and_the_report_says_so(tmp_path):
    _, report = rewritten(tmp_path, blocks(1), BSAPolicy(dense_steps=2))
    assert len(report.rewritten) == 1
    assert any("denoising step" in note for note in report.notes)


def test_a_mask_is_an_error_where_the_policy_says_so(tmp_path):
    graph = Graph(f"{X}, float[{TOKENS},{TOKENS}] mask", opset=23)
    model = graph.model(attention(graph, graph.heads(), graph.heads(), graph.heads(), mask="mask"))
    with pytest.raises(SiteError, match=r"must be rewritable at every site, got blocks\.0\.attn .*mask"):
        rewritten(tmp_path, model, BSAPolicy(on_unsupported="error"))
    assert not (tmp_path / "after.onnx").exists()


# -- where the tokens come from ---------------------------------------------------------------------------------------


def patched(kernel: int = 1) -> Graph:
    """Tokens by a Conv over time, height and width."""
    graph = Graph(inputs=f"float[{BATCH},4,2,{3 * kernel},{4 * kernel}] latents")
    weight = graph.weight(WIDTH, 4, 1, kernel, kernel)
    patches = graph(f"Conv<strides = [1, {kernel}, {kernel}]>(latents, {weight})")
    flat = graph(f"Reshape({patches}, {graph.ints(0, WIDTH, -1)})")
    graph.lines.append(f"x = Transpose<perm = [0, 2, 1]>({flat})")
    return graph


@pytest.mark.parametrize("kernel", [1, 2])
def test_tokens_of_a_patch_embedding(tmp_path, kernel):
    graph = patched(kernel)
    model = graph.model(graph.softmax(graph.heads(), graph.heads(), graph.heads()))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    assert_same(model, result)
    if kernel == 2:  # with patches of one position the latents themselves are in the same order
        with pytest.raises(GridError, match="same from every source"):
            rewritten(tmp_path, model, ALL, (2, 4, 3))


def test_noise_queries_over_all_keys_have_their_role(tmp_path):
    graph = patched(2)
    noise = graph(f"Slice(x, {graph.ints(12)}, {graph.ints(TOKENS)}, {graph.ints(1)})")
    model = graph.model(graph.softmax(graph.heads(noise, tokens=12), graph.heads(), graph.heads()))
    result, report = rewritten(tmp_path, model)
    assert (report.sites[0].role, report.sites[0].grid_q, report.sites[0].grid_k) == ("noise", (1, 3, 4), GRID)
    assert_same(model, result)


def test_a_grid_that_fits_nothing_is_an_error(tmp_path):
    with pytest.raises(GridError, match=r"grid 2x3x5 \(argument\) must hold as many tokens .*got 30 for .* of 24"):
        rewritten(tmp_path, blocks(1), ALL, (2, 3, 5))
    assert not (tmp_path / "after.onnx").exists()


def test_a_symbolic_number_of_tokens_is_an_error_that_names_it(tmp_path):
    graph = Graph(inputs=f"float[{BATCH},sequence,{WIDTH}] x")
    model = graph.model(graph.softmax(*(graph.heads(tokens=-1) for _ in range(3))))
    with pytest.raises(GridError, match="got 24 for a sequence of sequence"):
        rewritten(tmp_path, model)


def test_other_inputs_with_fewer_tokens_are_no_video(tmp_path):
    graph = Graph(inputs=f"{X}, float[{BATCH},8,{WIDTH}] text")
    first = graph.softmax(*(graph.heads("text", tokens=8) for _ in range(3)))
    second = graph.softmax(*(graph.heads() for _ in range(3)))
    _, report = rewritten(tmp_path, graph.model(first, second))
    assert [s.reason for s in report.sites] == ["not_video", "rewritten"]


# -- graphs inside graphs ---------------------------------------------------------------------------------------------


def test_attention_in_branches(tmp_path):
    """Both branches attend to what was computed outside of them."""
    graph = Graph(f"{X}, bool yes")
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    turned = graph(f"Transpose<perm = [0, 1, 3, 2]>({k})")

    def branch(name: str, inside: str) -> str:
        return (
            f"{name}_graph () => (float[{BATCH},{HEADS},{TOKENS},{DIM}] {name}) {{ {name}_s = MatMul({q}, {turned})"
            f" {name}_w = Softmax({inside}) {name} = MatMul({name}_w, {v}) }}"
        )

    two = graph.constant(2.0)
    out = graph(
        f"If(yes) <then_branch = {branch('a', 'a_s')},"
        f" else_branch = {branch('b', 'b_m').replace('b_w =', f'b_m = Mul(b_s, {two}) b_w =')}>"
    )
    model = graph.model(out)
    result, report = rewritten(tmp_path, model)
    assert [s.rewritten for s in report.sites] == [True, True], report
    inner = [n.op_type for a in result.graph.node[-1].attribute for n in a.g.node]
    assert (inner.count(NODE), "Softmax" in inner) == (2, False)
    for yes in (True, False):
        x = np.random.default_rng(2).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
        before, after = (run(m, x=x, yes=np.array(yes))[0] for m in (model, result))
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_attention_in_a_loop(tmp_path):
    """What the loop carries is a source of tokens of its own."""
    graph = Graph(f"{X}, int64 times, bool cond")
    split, merge = graph.ints(0, TOKENS, HEADS, DIM), graph.ints(0, TOKENS, WIDTH)
    shape = f"float[{BATCH},{TOKENS},{WIDTH}]"
    body = f"body (int64 i, bool go, {shape} h) => (bool on, {shape} y) {{ on = Identity(go) "
    for name in "qkv":
        body += f"{name}_p = MatMul(h, {graph.weight(WIDTH, WIDTH)}) {name}_s = Reshape({name}_p, {split}) "
        body += f"{name} = Transpose<perm = [0, 2, 1, 3]>({name}_s) "
    body += "t = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, t) w = Softmax(s) o = MatMul(w, v) "
    body += f"o_t = Transpose<perm = [0, 2, 1, 3]>(o) y = Reshape(o_t, {merge}) }}"
    out = graph(f"Loop(times, cond, x) <body = {body}>")
    model = graph.model(out)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(out, 1, [BATCH, TOKENS, WIDTH]))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    given = {"times": np.array(3), "cond": np.array(True)}
    np.testing.assert_allclose(run(result, **given)[0], run(model, **given)[0], rtol=1e-5, atol=1e-5)


def test_functions_of_another_opset_are_refused(tmp_path):
    graph = Graph()
    graph.functions.append(
        onnx.parser.parse_function('<domain: "mine", opset_import: ["": 21]> F (x) => (y) { y = Identity(x) }')
    )
    before = tmp_path / "before.onnx"
    onnx.save(graph.model(graph("mine.F(x)")), before)
    with pytest.raises(UsageError, match="must have functions of its own opset, got 'F' of opset 21"):
        rewrite_onnx(before, tmp_path / "after.onnx", ALL, GRID)


def test_attention_in_a_function_of_the_model(tmp_path):
    function = onnx.parser.parse_function(
        """<domain: "mine", opset_import: ["": 20]> Attend (q, k, v) => (y) {
            t = Transpose<perm = [0, 1, 3, 2]>(k)
            s = MatMul(q, t)
            w = Softmax(s)
            y = MatMul(w, v)
        }"""
    )
    graph = Graph()
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    graph.functions.append(function)
    model = graph.model(graph(f"mine.Attend({q}, {k}, {v})"))
    result, report = rewritten(tmp_path, model)
    assert len(report.rewritten) == 1
    assert_same(model, result)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing(tmp_path):
    rewritten(tmp_path, blocks(2), FEW)
    again = tmp_path / "again.onnx"
    report = rewrite_onnx(tmp_path / "after.onnx", again, FEW, GRID)
    assert again.read_bytes() == (tmp_path / "after.onnx").read_bytes()
    assert report.sites == []


def test_the_second_run_follows_tokens_through_what_the_first_wrote(tmp_path):
    first = BSAPolicy(
        sparsity=0.0, chunk_3d_shape_q=TILE, chunk_3d_shape_k=TILE, rules=(Rule(module="blocks.1.*", dense=True),)
    )
    model = blocks(2)
    rewritten(tmp_path, model, first)
    result, report = rewritten(tmp_path, onnx.load(tmp_path / "after.onnx"))
    assert [s.module for s in report.rewritten] == ["blocks.1.attn"]
    assert ops(result).count(NODE) == 2
    assert_same(model, result)


def test_in_place(tmp_path):
    path = tmp_path / "model.onnx"
    model = blocks(1)
    onnx.save(model, path)
    assert len(rewrite_onnx(path, path, ALL, TokenGrid(*GRID)).rewritten) == 1
    assert_same(model, onnx.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("policy", [ALL, BSAPolicy.dense()], ids=["rewritten", "copied"])
def test_weights_beside_the_file(tmp_path, policy):
    """The new file stands for itself, wherever it lies."""
    source, target = tmp_path / "a", tmp_path / "b" / "c"
    source.mkdir()
    model = blocks(1)
    onnx.save_model(
        onnx.ModelProto.FromString(model.SerializeToString()),
        source / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
        convert_attribute=False,
    )
    rewrite_onnx(source / "model.onnx", target / "model.onnx", policy, GRID)
    for path in source.iterdir():
        path.unlink()
    result = onnx.load(target / "model.onnx")
    assert (NODE in ops(result)) == policy.enabled
    assert_same(model, result)


def test_outputs_keep_their_names_and_order(tmp_path):
    graph = Graph()
    q, k, v = graph.heads(), graph.heads(), graph.heads()
    out = graph.softmax(q, k, v)
    model = graph.model(v, out, q)
    result, _ = rewritten(tmp_path, model)
    assert [o.name for o in result.graph.output] == [v, out, q]
    assert_same(model, result)


@pytest.mark.parametrize("content", [None, b"", b"no model at all", b"\x08\x0a"])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="path_in must be an ONNX file"):
        rewrite_onnx(path, tmp_path / "out.onnx", ALL, GRID)
    assert not (tmp_path / "out.onnx").exists()


def test_missing_weights_are_one_error(tmp_path):
    onnx.save_model(blocks(1), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(UsageError, match=r"path_in must have its weights beside it, got .*w\.bin"):
        rewrite_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx", ALL, GRID)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("opset", [13, 17, 24])
def test_unsupported_opsets_are_refused(tmp_path, opset):
    model = blocks(1)
    model.opset_import[0].version = opset
    with pytest.raises(UsageError, match=f"must be from 18 to 23, got {opset} .*version_converter"):
        rewritten(tmp_path, model)


def test_paths_that_cannot_be_written_are_refused_first(tmp_path):
    with pytest.raises(UsageError, match="path_out must be a file"):
        rewrite_onnx(tmp_path / "there is none.onnx", tmp_path, ALL, GRID)


@pytest.mark.parametrize("grid", [None, (1, 2), (0, 1, 1), "2x3x4"])
def test_grids_that_are_none_are_refused(tmp_path, grid):
    with pytest.raises(GridError, match="grid must"):
        rewritten(tmp_path, blocks(1), ALL, grid)


# -- what torch exports -----------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (z.transpose(1, 2) for z in self.qkv(x).view(batch, tokens, 3, HEADS, DIM).unbind(2))
        if self.how == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        return out.transpose(1, 2).reshape(batch, tokens, WIDTH)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attend("sdpa"), Attend("manual")])
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x + self.mha(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("opset", "dynamo"), [(18, True), (23, True), (18, False)])
def test_exports_of_torch(tmp_path, opset, dynamo):
    torch.manual_seed(0)
    net, x, file = Net().eval(), torch.randn(BATCH, TOKENS, WIDTH), io.BytesIO()
    axes: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, (x,), *([] if dynamo else [file]), dynamo=dynamo, opset_version=opset, **axes)
    model = program.model_proto if dynamo else onnx.load_from_string(file.getvalue())
    result, report = rewritten(tmp_path, model)
    assert [(s.module, s.reason) for s in report.sites] == [
        ("blocks.0", "rewritten"),
        ("blocks.1", "rewritten"),
        ("mha", "rewritten"),
    ], report
    assert report.sites[0].batch == "batch"
    assert not {"Softmax", "Attention"} & set(ops(result))
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(run(result, x=x.numpy())[0], expected, rtol=1e-5, atol=1e-5)


def test_longcat_with_a_cache_is_decided_as_its_torch_graph(tmp_path):
    """The class name in the file tells that the cache holds whole frames."""
    model = LongCatVideoTransformer3DModel.from_pretrained(CHECKPOINT)
    policy = BSAPolicy(sparsity=0.7, chunk_3d_shape_q=TILE, chunk_3d_shape_k=TILE)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the model says that it runs dense
        args, kwargs = call(model, "cached")
        program = torch.export.export(model, args, kwargs)
        dense_file = torch.onnx.export(program, dynamo=True, opset_version=20).model_proto
        sparse, expected = bsa_compile.rewrite(program, policy, (2, 6, 10))
        outputs = tensors(sparse.module()(*args, **kwargs))
    result, report = rewritten(tmp_path, dense_file, policy, (2, 6, 10))
    assert [s.role for s in report.rewritten] == ["cached", "cached"]
    for site, other in zip(report.sites, expected.sites, strict=True):
        for name in ("module", "role", "reason", "grid_q", "grid_k", "tile_q", "sparsity", "tokens_q", "tokens_k"):
            assert getattr(site, name) == getattr(other, name), name
    feeds = [t.numpy() for t in tensors((args, kwargs))]
    found = run(result, **dict(zip((i.name for i in result.graph.input), feeds, strict=True)))
    for a, b in zip(found, outputs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4)
