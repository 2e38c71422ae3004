"""The node's functions: onnxruntime and onnx's own evaluator against the specification in fp64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsa_compile import reference
from bsa_compile.errors import GridError, MissingExtraError, UsageError
from bsa_compile.exporting import onnx_function
from bsa_compile.exporting.onnx_function import DOMAIN, NODE, OPSETS, VERSION, functions, node_attributes
from tests.attention_cases import Case, cases

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def attributes_of(case: Case) -> dict[str, Any]:
    return node_attributes(*case.grids, case.sparsity, case.cdf_threshold, case.scale)


def build(attributes: dict[str, Any], opset: int = 21, dtype: int = FLOAT, cast: bool = False) -> onnx.ModelProto:
    """A model of the node with all axes dynamic, and beside it the selection that its nested functions make.

    Args:
        attributes: of the node.
        opset: of the model and the functions.
        dtype: element type of the node's tensors.
        cast: the model's own tensors are fp32, whatever the node's.
    """
    q_tiling = {"grid": attributes["grid_q"], "tile": attributes["tile_q"]}
    k_tiling = {"grid": attributes["grid_k"], "tile": attributes["tile_k"]}
    criteria = {name: attributes[name] for name in ("scale", "top_k", "cdf_threshold")}

    def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs.split(), outputs.split(), domain=DOMAIN, **attributes)

    nodes = [
        *(helper.make_node("Cast", [f"{name}_in"], [name], to=dtype) for name in "QKV" if cast),
        node(NODE, "Q K V", "Y", **attributes),
        node("TileTokens", "Q", "q_tiles q_valid", **q_tiling),
        node("TileTokens", "K", "k_tiles k_valid", **k_tiling),
        node("PoolTiles", "q_tiles q_valid", "q_mean"),
        node("PoolTiles", "k_tiles k_valid", "k_mean"),
        node("SelectTiles", "q_mean k_mean", "count index", **criteria),
        *(helper.make_node("Cast", ["Y"], ["Y_out"], to=FLOAT) for _ in range(cast)),
    ]
    value, outer = helper.make_tensor_value_info, FLOAT if cast else dtype
    shapes = {"Q": ["B", "H", "Sq", "D"], "K": ["B", "G", "Sk", "D"], "V": ["B", "G", "Sk", "D"]}
    inputs = [value(f"{name}_in" if cast else name, outer, shape) for name, shape in shapes.items()]
    outputs = [
        value("Y_out" if cast else "Y", outer, shapes["Q"]),
        value("count", TensorProto.INT64, ["R"]),
        value("index", TensorProto.INT64, ["R", "Kmax"]),
    ]
    return helper.make_model(
        helper.make_graph(nodes, "attention", inputs, outputs),
        functions=functions(opset),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )


def runtime(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(runner: Any, *qkv: Tensor) -> tuple[Tensor, list[set[int]]]:
    """y, and of each row (head by head, tile by tile) the selected key tiles."""
    names = runner.input_names if isinstance(runner, ReferenceEvaluator) else [x.name for x in runner.get_inputs()]
    with np.errstate(invalid="ignore"):  # some tests want to see what becomes of infinities
        y, counts, indices = runner.run(None, {name: x.numpy() for name, x in zip(names, qkv, strict=True)})
    rows = [set(row[:count].tolist()) for row, count in zip(indices, counts, strict=True)]
    assert [len(row) for row in rows] == counts.tolist(), "a tile is selected twice"
    return torch.from_numpy(np.asarray(y)), rows


def check(case: Case, y: Tensor, rows: list[set[int]], q: Tensor, k: Tensor, v: Tensor) -> int:
    """Hold a result to the specification; returns the number of rows that select differently, each justified."""
    pooled = reference.pool(q, *case.grids[:2]), reference.pool(k, *case.grids[2:])
    scores = reference.scores(*pooled).flatten(0, 2)
    counts, indices = reference.select(*pooled, case.sparsity, case.cdf_threshold, case.scale)
    out, _ = reference.attend(q, k, v, counts, indices, *case.tail)
    tokens = reference.tile_tokens(*case.grids[:2])
    assert y.shape == out.shape
    assert bool(torch.isfinite(y).all())
    different, worst = 0, 0.0
    flat_y, flat_out = (x.flatten(0, 1) for x in (y.double(), out))
    for i, (ours, row) in enumerate(zip(rows, scores, strict=True)):
        theirs, best_first = reference.select_row(row.tolist(), case.sparsity, case.cdf_threshold, case.scale)
        if ours != set(theirs):
            different += 1
            justify(case, row, ours, set(theirs), best_first)
        else:
            head, tile = divmod(i, case.num_q)
            worst = max(worst, float((flat_y - flat_out)[head, tokens[tile]].abs().max()))
    assert worst <= 1e-5 * float(out.abs().max()), f"relative error {worst / float(out.abs().max()):.2e}"
    return different


def justify(case: Case, row: Tensor, ours: set[int], theirs: set[int], best_first: list[int]) -> None:
    """A row may select differently only where two scores, or a mass and the threshold, are as good as equal."""
    if len(ours) != len(theirs):
        fewer = min(len(ours), len(theirs))
        mass = (row * case.scale).softmax(-1)[best_first[:fewer]].sum()
        assert case.cdf_threshold is not None
        assert abs(float(mass) - case.cdf_threshold) <= 1e-6
    kept, ranked = row[list(ours)].min(), row[best_first[: len(ours)]].min()
    assert abs(float(kept - ranked)) <= 1e-5 * float(row.abs().max())


MODELS = {
    "onnxruntime": runtime,
    "onnx": ReferenceEvaluator,
}


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, BFLOAT16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("opset", OPSETS)
def test_a_model_with_the_functions_passes_the_full_check(opset, dtype):
    model = build(attributes_of(Case(cdf_threshold=0.5)), opset, dtype)
    onnx.checker.check_model(model, full_check=True)
    assert [f.name for f in model.functions][-1] == NODE
    assert all(f.domain == DOMAIN for f in model.functions)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_computes_the_same(opset, kind):
    case = Case(heads=4, batch=2, cdf_threshold=0.6)
    q, k, v = case.qkv()
    y, rows = run(MODELS[kind](build(attributes_of(case), opset)), q, k, v)
    assert check(case, y, rows, q, k, v) == 0


raster_cases = cases(layout="raster")
steps = st.sampled_from([1, 20_000, onnx_function.STEP_ELEMENTS])
ODD = Case(grid_q=(1, 5, 7), tile_q=(2, 2, 3), grid_k=(5, 3, 4), tile_k=(3, 2, 4), heads=6, batch=2, head_dim=24)


def agrees(kind: str, case: Case, step_elements: int) -> None:
    q, k, v = case.qkv()
    with patch.object(onnx_function, "STEP_ELEMENTS", step_elements):
        model = build(attributes_of(case))
    y, rows = run(MODELS[kind](model), q, k, v)
    different = check(case, y, rows, q, k, v)
    event(f"rows that select differently: {different}")


@settings(max_examples=40)
@given(raster_cases, steps)
@example(ODD.but(sparsity=0.3), 20_000)
@example(ODD.but(sparsity=None, cdf_threshold=0.7), 20_000)
@example(ODD.but(cdf_threshold=0.7), 1)
@example(Case(grid_q=(1, 1, 1), tile_q=(4, 4, 4), grid_k=(1, 1, 1), tile_k=(1, 1, 1)), 1)
def test_onnxruntime_computes_the_specification(case, step_elements):
    agrees("onnxruntime", case, step_elements)


@settings(max_examples=15)
@given(raster_cases, steps)
@example(ODD.but(cdf_threshold=0.7), 20_000)
def test_the_evaluator_of_onnx_computes_the_specification(case, step_elements):
    agrees("onnx", case, step_elements)


@settings(max_examples=10)
@given(cases(layout="raster", sparsity=0.0, cdf_threshold=None))
def test_sparsity_zero_is_dense_attention(case):
    q, k, v = case.qkv()
    y, _ = run(runtime(build(attributes_of(case))), q, k, v)
    group = case.heads // case.heads_kv
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), keys, values)
    assert float((y - dense).abs().max()) <= 1e-5 * float(dense.abs().max())


def test_one_model_serves_every_batch():
    case = Case(batch=3, cdf_threshold=0.4)
    q, k, v = case.qkv()
    runner = runtime(build(attributes_of(case)))
    together, rows = run(runner, q, k, v)
    for b in range(3):
        alone, own = run(runner, *(x[b : b + 1].contiguous() for x in (q, k, v)))
        assert float((alone[0] - together[b]).abs().max()) <= 1e-6
        assert own == rows[b * len(own) : (b + 1) * len(own)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_rounds_inputs_and_output_alone(dtype):
    case = ODD.but(cdf_threshold=0.6)
    onnx_type = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}[dtype]
    q, k, v = (x.to(dtype).float() for x in case.qkv())
    y, rows = run(runtime(build(attributes_of(case), dtype=onnx_type, cast=True)), q, k, v)
    exact, exact_rows = run(runtime(build(attributes_of(case))), q, k, v)
    assert rows == exact_rows
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y, exact, rtol=1.01 * rounding, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("criteria", [(0.7, None), (None, 0.3), (0.9, 0.3)], ids=["top-k", "cdf", "both"])
def test_what_a_row_did_not_select_does_not_show(criteria, poison, kind):
    case = ODD.but(sparsity=criteria[0], cdf_threshold=criteria[1])
    q, k, v = case.qkv()
    runner = MODELS[kind](build(attributes_of(case)))
    y, rows = run(runner, q, k, v)
    tile = min(range(case.num_k), key=lambda j: sum(j in row for row in rows))
    keepers = {i for i, row in enumerate(rows) if tile not in row}
    assert keepers, "every row selects every tile"
    v[:, :, reference.tile_tokens(*case.grids[2:])[tile]] = poison  # not k: that would change the selection
    poisoned, same_rows = run(runner, q, k, v)
    assert same_rows == rows
    q_tokens = reference.tile_tokens(*case.grids[:2])
    for i in range(len(rows)):
        head, n = divmod(i, case.num_q)
        ours, before = (x.flatten(0, 1)[head, q_tokens[n]] for x in (poisoned, y))
        assert torch.equal(ours, before) if i in keepers else not bool(torch.isfinite(ours).any())


@pytest.mark.parametrize("kind", MODELS)
def test_a_key_tile_with_nan_has_the_lowest_score(kind):
    case = Case(sparsity=0.5)
    q, k, v = case.qkv()
    tile = 3
    k[:, :, reference.tile_tokens(*case.grids[2:])[tile][0]] = float("nan")
    y, rows = run(MODELS[kind](build(attributes_of(case))), q, k, v)
    assert all(tile not in row for row in rows)
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("sparsity", "threshold", "count"), [(0.7, None, 3), (None, 0.35, 4), (0.5, 0.3, 5)])
def test_ties_go_to_the_lower_index(sparsity, threshold, count, kind):
    case = Case(grid_k=(1, 1, 10), tile_k=(1, 1, 1), sparsity=sparsity, cdf_threshold=threshold)
    q, k, v = case.qkv()
    k[:] = k[:, :, :1]
    _, rows = run(MODELS[kind](build(attributes_of(case))), q, k, v)
    assert all(row == set(range(count)) for row in rows)


@pytest.mark.parametrize("tenths", range(1, 11))
def test_equal_masses_reach_the_threshold_that_they_add_up_to(tenths):
    case = Case(grid_k=(1, 1, 10), tile_k=(1, 1, 1), sparsity=None, cdf_threshold=tenths / 10)
    q, k, v = case.qkv()
    _, rows = run(runtime(build(attributes_of(case))), q, torch.zeros_like(k), v)
    assert {len(row) for row in rows} == {tenths}


@pytest.mark.parametrize(("threshold", "count"), [(1e-300, 1), (1 - 1e-12, 1), (1.0, 5)])
def test_a_threshold_that_fp32_would_round_to_0_or_1_keeps_its_meaning(threshold, count):
    case = Case(grid_k=(1, 1, 5), tile_k=(1, 1, 1), sparsity=None, cdf_threshold=threshold)
    q, k, v = case.qkv()
    q[:], k[:], k[:, :, 2] = 10, 0, 10  # one tile has all the mass
    _, rows = run(runtime(build(attributes_of(case))), q, k, v)
    assert {len(row) for row in rows} == {count}


PEAK = """
import resource, sys
import numpy, onnxruntime
shape = (1, 8, 4096, 32)
feeds = {n: numpy.random.default_rng(0).standard_normal(shape, dtype=numpy.float32) for n in "QKV"}
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
runner = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
runner.run(["Y"], feeds)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory as Linux reports it")
def test_memory_does_not_hold_a_square_of_the_tokens(tmp_path):
    attributes = node_attributes((4, 32, 32), (4, 4, 4), (4, 32, 32), (4, 4, 4), 0.9375, None, 32**-0.5)
    path = tmp_path / "model.onnx"
    onnx.save(build(attributes), path)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one_head_squared = 4096 * 4096 * 4  # 64 MiB; all heads together 512 MiB
    tensors = 8 * 8 * 4096 * 32 * 4  # the tiles of q, k, v, the output on its way, some room: 32 MiB
    assert int(done.stdout) * 1024 < one_head_squared + tensors


@pytest.mark.parametrize("side", ["Sq", "Sk", "heads"])
def test_shapes_that_do_not_fit_are_an_error_of_the_runtime(side):
    case = Case(heads=4, heads_kv=2)
    q, k, v = case.qkv()
    if side == "Sq":
        q = torch.cat([q, q], 2)
    elif side == "Sk":
        k, v = k[:, :, 1:].contiguous(), v[:, :, 1:].contiguous()
    else:
        q = q[:, :3].contiguous()
    runner = runtime(build(attributes_of(case)))
    with pytest.raises(Exception, match=r"(?i)reshape"):
        run(runner, q, k, v)


@pytest.mark.parametrize("opset", [18, 19, 24, 25, "21", 21.0, True, None])
def test_an_unsupported_opset_is_named(opset):
    with pytest.raises(UsageError, match=r"opset must be an integer from 20 to 23, got "):
        functions(opset)


def test_without_onnx_the_extra_is_named():
    with patch.dict(sys.modules, {"onnx": None}), pytest.raises(MissingExtraError, match=r"bsa-compile\[onnx\]"):
        functions(21)


GRIDS: tuple[Any, ...] = ((2, 4, 4), (1, 2, 2), (3, 5, 4), (2, 2, 2))


def test_attributes_hold_the_count_as_the_decimal_says():
    assert node_attributes(*GRIDS, 0.9, None, 0.125) == {
        "grid_q": [2, 4, 4],
        "tile_q": [1, 2, 2],
        "grid_k": [3, 5, 4],
        "tile_k": [2, 2, 2],
        "scale": 0.125,
        "top_k": 1,
        "cdf_threshold": 0.0,
    }
    twenty = ((1, 1, 20), (1, 1, 1)) * 2
    assert [node_attributes(*twenty, s, None, 1.0)["top_k"] for s in (0.0, 0.9, 0.95, 1.0)] == [20, 2, 1, 1]
    both = node_attributes(*twenty, 0.5, 0.75, 1.0)
    assert (both["top_k"], both["cdf_threshold"]) == (10, 0.75)
    assert node_attributes(*twenty, None, 0.75, 1.0)["top_k"] == 0


@pytest.mark.parametrize(
    ("criteria", "text"),
    [
        ((None, None, 1.0), "sparsity must be given, or cdf_threshold, or both, got neither"),
        ((1.5, None, 1.0), r"sparsity must be a number in \[0, 1\], got 1.5"),
        ((float("nan"), None, 1.0), r"sparsity must be a number in \[0, 1\], got nan"),
        ((None, 0.0, 1.0), r"cdf_threshold must be a number in \(0, 1\], got 0.0"),
        ((None, float("nan"), 1.0), r"cdf_threshold must be a number in \(0, 1\], got nan"),
        ((0.5, None, float("inf")), "scale must be a finite number, got inf"),
    ],
)
def test_numbers_out_of_range_are_named(criteria, text):
    with pytest.raises(UsageError, match=text):
        node_attributes(*GRIDS, *criteria)


def test_a_malformed_grid_is_named():
    with pytest.raises(GridError, match="tile_k must be three positive integers"):
        node_attributes(*GRIDS[:3], (2, 0, 2), 0.5, None, 1.0)
