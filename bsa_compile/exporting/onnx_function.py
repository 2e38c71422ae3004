"""The ONNX node `ai.bsa::GatedBlockSparseAttention` and the functions that define it by standard operators.

The functions travel inside every file that uses the node: a runtime that knows nothing of it runs them, and one with
a kernel of its own binds the node. They are written in ONNX's textual form, so that this source is the specification;
docs/export.md explains it. In the comments: B batch, H query heads, G key heads, S tokens, N tiles of V positions,
D head size; R = B * H * Nq rows, one per head and query tile, of which C are handled together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError, must, require_extra
from ..grid import as_shape3, num_tiles
from ..policy import keep_count

if TYPE_CHECKING:
    import onnx

DOMAIN = "ai.bsa"
VERSION = 1
NODE = "GatedBlockSparseAttention"
OPSETS = range(20, 24)

# The attribute holds the threshold in fp32, up to 3e-8 beside the number that was asked for.
MASS_SLACK = 1e-7

# Elements that one step of the loop gathers and computes, at least one row's: bounds memory, and should fit the caches.
STEP_ELEMENTS = 1 << 21

# Depends on attributes alone: a runtime folds it to constants.
_TOKEN_TABLE = """
TokenTable <grid, tile> () => (Token, Valid)
{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  nothing = Constant <value_ints = [0, 0, 0]> ()
  two_rows = Constant <value_ints = [2, 3]> ()
  flat = Constant <value_ints = [-1]> ()
  size = Constant <value_ints: ints = @grid> ()
  step = Constant <value_ints: ints = @tile> ()
  up = Sub (step, one)
  more = Add (size, up)
  count = Div (more, step)                                # tiles along t, h, w
  padded = Mul (count, step)
  beyond = Sub (padded, size)
  pads = Concat <axis = 0> (nothing, beyond)
  tokens = ReduceProd <keepdims = 0> (size)
  tokens_in_order = Range (zero, tokens, one)
  raster = Reshape (tokens_in_order, size)
  raster_padded = Pad (raster, pads, tokens)              # S where there is no token
  count_step = Concat <axis = 0> (count, step)
  count_over_step = Reshape (count_step, two_rows)
  interleaved = Transpose (count_over_step)
  six_sizes = Reshape (interleaved, flat)
  split = Reshape (raster_padded, six_sizes)              # [nt, tt, nh, th, nw, tw]
  by_tile = Transpose <perm = [0, 2, 4, 1, 3, 5]> (split)
  num_tiles = ReduceProd <keepdims = 1> (count)
  volume = ReduceProd <keepdims = 1> (step)
  table_shape = Concat <axis = 0> (num_tiles, volume)
  Token = Reshape (by_tile, table_shape)                  # [N, V] int64: the token at each position of each tile
  Valid = Less (Token, tokens)                            # [N, V] bool
}
"""

# What has the type of X passes through Reshape, Concat, Gather and Cast only, which runtimes have for every type; all
# arithmetic is in fp32 or better. Zeros at the positions beyond the grid keep them out of the sums.
_TILE_TOKENS = """
TileTokens <grid, tile> (X) => (Tiles, Valid)
{
  Token, Valid = ai.bsa.TokenTable <grid: ints = @grid, tile: ints = @tile> ()
  size = Constant <value_ints: ints = @grid> ()
  tokens = ReduceProd <keepdims = 1> (size)
  lead = Shape <start = 0, end = 2> (X)
  width = Shape <start = 3> (X)
  x_shape = Concat <axis = 0> (lead, tokens, width)
  checked = Reshape (X, x_shape)                          # an error where S is not the grid's number of tokens
  missing = Not (Valid)
  missing_int = Cast <to = 7> (missing)
  num_missing = ReduceSum <keepdims = 0> (missing_int)
  zero = Constant <value_int = 0> ()
  partial = Greater (num_missing, zero)
  Source = If (partial) <
    then_branch = padded () => (Extended) {
      single = Constant <value_ints = [1]> ()
      zero_shape = Concat <axis = 0> (lead, single, width)
      zeros = ConstantOfShape (zero_shape)
      zero_token = CastLike (zeros, X)                    # [B, H, 1, D]
      Extended = Concat <axis = 2> (checked, zero_token)
    },
    else_branch = whole () => (Same) { Same = Identity (checked) }
  >
  Tiles = Gather <axis = 2> (Source, Token)               # [B, H, N, V, D]
}
"""

_POOL_TILES = """
PoolTiles (Tiles, Valid) => (Mean)
{
  positions = Constant <value_ints = [3]> ()
  row = Constant <value_ints = [1]> ()
  tiles32 = Cast <to = 1> (Tiles)
  total = ReduceSum <keepdims = 0> (tiles32, positions)
  ones = Cast <to = 1> (Valid)
  size = ReduceSum <keepdims = 1> (ones, row)             # [N, 1]
  Mean = Div (total, size)                                # [B, H, N, D] float
}
"""

# Query heads that share a key head, and their tiles, are one long axis here: rows come out in the order b, h, tile. One
# key head at a time, so that no more than one head's scores is ever held.
_SELECT_TILES = """
SelectTiles <scale, top_k, cdf_threshold> (QMean, KMean) => (Count, Index)
{
  flat = Constant <value_ints = [-1]> ()
  last_axis = Constant <value_ints = [-1]> ()
  one = Constant <value_int = 1> ()
  axis = Constant <value_int = -1> ()
  lowest = Constant <value = float {-inf}> ()
  lowest64 = Constant <value = double {-inf}> ()
  one64 = Constant <value = double {1}> ()

  heads = Shape <start = 1, end = 2> (QMean)
  num_q = Shape <start = 2, end = 3> (QMean)
  width = Shape <start = 3> (QMean)
  kv_lead = Shape <start = 0, end = 2> (KMean)
  kv_heads = Shape <start = 1, end = 2> (KMean)
  num_kv = Shape <start = 2, end = 3> (KMean)
  group = Div (heads, kv_heads)
  rows_per_kv_head = Mul (group, num_q)
  all_kv_heads = ReduceProd <keepdims = 0> (kv_lead)
  all_kv_heads_axis = ReduceProd <keepdims = 1> (kv_lead)
  q_shape = Concat <axis = 0> (all_kv_heads_axis, rows_per_kv_head, width)
  k_shape = Concat <axis = 0> (all_kv_heads_axis, num_kv, width)
  q_means = Reshape (QMean, q_shape)                      # [B * G, H / G * Nq, D]
  k_means = Reshape (KMean, k_shape)                      # [B * G, Nk, D]

  # All tiles need sorting only for the CDF.
  top_k_asked = Constant <value_int: int = @top_k> ()
  top_k_some = Max (top_k_asked, one)
  top_k_fits = Min (top_k_some, num_kv)                   # [1]
  threshold = Constant <value_float: float = @cdf_threshold> ()
  no_mass = Constant <value = float {0}> ()
  all_mass = Constant <value = float {1}> ()
  by_mass = Greater (threshold, no_mass)
  num_sorted = Where (by_mass, num_kv, top_k_fits)        # [1] Kmax
  takes_all = GreaterOrEqual (threshold, all_mass)
  slack = Constant <value = double {$MASS_SLACK}> ()
  threshold64 = Cast <to = 11> (threshold)
  threshold_less = Sub (threshold64, slack)
  scale32 = Constant <value_float: float = @scale> ()
  scale64 = Cast <to = 11> (scale32)

  always = Constant <value = bool {1}> ()
  counts, indices = Loop (all_kv_heads, always) <body = head (int64 i, bool go) => (bool go_on, count, index)
    {
      go_on = Identity (go)
      # Products of fp32 numbers are exact in double, and their sum is rounded to float once: equal key tiles tie.
      q32 = Gather (q_means, i)
      k32 = Gather (k_means, i)
      q64 = Cast <to = 11> (q32)
      k64 = Cast <to = 11> (k32)
      k64_t = Transpose <perm = [1, 0]> (k64)
      score64 = MatMul (q64, k64_t)
      score32 = Cast <to = 1> (score64)
      undefined = IsNaN (score32)
      score = Where (undefined, lowest, score32)          # [H / G * Nq, Nk]
      # Among equal scores TopK takes the lower index first.
      best, index = TopK <axis = -1, largest = 1, sorted = 1> (score, num_sorted)

      # How many, best first, reach the mass. A threshold of 0 is reached at once.
      best64 = Cast <to = 11> (best)
      product = Mul (best64, scale64)
      product_undefined = IsNaN (product)
      logit = Where (product_undefined, lowest64, product)
      top = ReduceMax <keepdims = 1> (logit, last_axis)
      below = Sub (logit, top)
      weight_below = Exp (below)
      at_top = Equal (logit, top)
      weight = Where (at_top, one64, weight_below)        # 1 also where the top is infinite
      mass = CumSum (weight, axis)
      total = ReduceSum <keepdims = 1> (weight, last_axis)
      wanted = Mul (threshold_less, total)
      short = Less (mass, wanted)
      short_int = Cast <to = 7> (short)
      num_short = ReduceSum <keepdims = 0> (short_int, last_axis)
      crossing = Add (num_short, one)
      crossing_fits = Min (crossing, num_kv)
      mass_count = Where (takes_all, num_kv, crossing_fits)
      count = Max (mass_count, top_k_fits)                # [H / G * Nq]
    }
  >
  Count = Reshape (counts, flat)                          # [R] int64
  index_shape = Concat <axis = 0> (flat, num_sorted)
  Index = Reshape (indices, index_shape)                  # [R, Kmax] int64, best first
}
"""

# Rows that select about equally many tiles are handled together, as many at a time as the budget allows.
_ATTEND_TILES = """
AttendTiles <scale> (QTiles, KTiles, VTiles, KValid, Count, Index, Uneven) => (Tiles)
{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  flat = Constant <value_ints = [-1]> ()
  at0 = Constant <value_ints = [0]> ()
  at1 = Constant <value_ints = [1]> ()
  infinite = Constant <value = float {-inf}> ()
  no_penalty = Constant <value = float {0}> ()
  scale32 = Constant <value_float: float = @scale> ()

  q_tile_shape = Shape <start = 3> (QTiles)
  k_tile_shape = Shape <start = 3> (KTiles)
  q_shape = Concat <axis = 0> (flat, q_tile_shape)
  k_shape = Concat <axis = 0> (flat, k_tile_shape)
  q_tiles = Reshape (QTiles, q_shape)                     # [R, P, D]
  k_tiles = Reshape (KTiles, k_shape)                     # [B * G * Nk, V, D]
  v_tiles = Reshape (VTiles, k_shape)
  row_axes = Shape <start = 0, end = 3> (QTiles)
  kv_head_axes = Shape <start = 0, end = 2> (KTiles)
  kv_axis = Shape <start = 2, end = 3> (KTiles)
  volume_axis = Shape <start = 3, end = 4> (KTiles)
  q_volume_axis = Shape <start = 3, end = 4> (QTiles)
  width_axis = Shape <start = 4> (QTiles)
  num_rows = ReduceProd <keepdims = 0> (row_axes)
  num_kv_heads = ReduceProd <keepdims = 0> (kv_head_axes)
  num_kv = Squeeze (kv_axis, at0)
  rows_per_kv_head = Div (num_rows, num_kv_heads)
  keys_shape = Concat <axis = 0> (at0, flat, width_axis)
  mask_shape = Concat <axis = 0> (at0, at1, flat)
  missing = Not (KValid)
  missing_int = Cast <to = 7> (missing)
  any_missing = ReduceMax <keepdims = 0> (missing_int)
  partial = Cast <to = 9> (any_missing)
  masked = Or (partial, Uneven)

  # Long rows first; TopK keeps the order of equal ones, so that neighbours share keys in the caches.
  num_rows_axis = Unsqueeze (num_rows, at0)
  sorted_count, order = TopK <axis = 0, largest = 1, sorted = 1> (Count, num_rows_axis)

  # Rows per step: of a row of the longest list, keys and values are gathered, scores and weights computed.
  longest = ReduceMax <keepdims = 0> (Count)
  both_sides = Add (q_volume_axis, width_axis)
  twice = Mul (both_sides, two)
  per_position = Squeeze (twice, at0)
  volume = Squeeze (volume_axis, at0)
  per_tile = Mul (per_position, volume)
  per_row = Mul (per_tile, longest)
  budget = Constant <value_int = $STEP_ELEMENTS> ()
  fit = Div (budget, per_row)
  fit_some = Max (fit, one)
  most = Sub (num_rows, one)
  steps_before_last = Div (most, fit_some)
  num_steps = Add (steps_before_last, one)
  evenly = Div (most, num_steps)
  step_rows = Add (evenly, one)
  in_step = Range (zero, step_rows, one)
  always = Constant <value = bool {1}> ()
  out = Loop (num_steps, always) <body = step (int64 i, bool go) => (bool go_on, step_out)
    {
      go_on = Identity (go)
      first = Mul (i, step_rows)
      slot_or_more = Add (in_step, first)
      slot = Min (slot_or_more, most)                     # the last step repeats the last row
      row = Gather (order, slot)                          # [C]
      count = Gather (Count, row)
      row_longest = ReduceMax <keepdims = 1> (count, at0)
      chosen_long = Gather (Index, row)
      chosen = Slice (chosen_long, at0, row_longest, at1)
      count_column = Unsqueeze (count, at1)
      longest_here = Squeeze (row_longest, at0)
      place = Range (zero, longest_here, one)
      used = Less (place, count_column)                   # [C, K]
      best = Slice (chosen_long, at0, at1, at1)
      tile = Where (used, chosen, best)                   # beyond the count: a tile that the row reads anyway
      kv_head = Div (row, rows_per_kv_head)
      kv_start = Mul (kv_head, num_kv)
      kv_start_column = Unsqueeze (kv_start, at1)
      kv_tile = Add (tile, kv_start_column)
      k_parts = Gather (k_tiles, kv_tile)                 # [C, K, V, D]
      v_parts = Gather (v_tiles, kv_tile)
      k_own = Reshape (k_parts, keys_shape)               # [C, K * V, D]
      v_own = Reshape (v_parts, keys_shape)
      k32 = Cast <to = 1> (k_own)
      v32 = Cast <to = 1> (v_own)
      q_own = Gather (q_tiles, row)                       # [C, P, D]
      q32 = Cast <to = 1> (q_own)
      q_scaled = Mul (q32, scale32)
      k_t = Transpose <perm = [0, 2, 1]> (k32)
      score = MatMul (q_scaled, k_t)                      # [C, P, K * V]
      score_masked = If (masked) <
        then_branch = some () => (hidden) {
          valid = Gather (KValid, tile)                   # [C, K, V]
          used_column = Unsqueeze (used, flat)
          seen = And (valid, used_column)
          penalty = Where (seen, no_penalty, infinite)
          penalty_row = Reshape (penalty, mask_shape)
          hidden = Add (score, penalty_row)
        },
        else_branch = all () => (plain) { plain = Identity (score) }
      >
      weight = Softmax <axis = -1> (score_masked)
      out32 = MatMul (weight, v32)
      step_out = CastLike (out32, QTiles)                 # [C, P, D]
    }
  >
  by_slot = Reshape (out, q_shape)                        # at least R tiles, in the order of the slots
  slots = Range (zero, num_rows, one)
  slot_of_row = ScatterElements (slots, order, slots)     # [R]
  Tiles = Gather (by_slot, slot_of_row)
}
"""

_NODE = """
GatedBlockSparseAttention <grid_q, tile_q, grid_k, tile_k, scale, top_k: int = 0, cdf_threshold: float = 0.0>
  (Q, K, V) => (Y)
{
  q_tiles, q_valid = ai.bsa.TileTokens <grid: ints = @grid_q, tile: ints = @tile_q> (Q)
  k_tiles, k_valid = ai.bsa.TileTokens <grid: ints = @grid_k, tile: ints = @tile_k> (K)
  v_tiles, v_valid = ai.bsa.TileTokens <grid: ints = @grid_k, tile: ints = @tile_k> (V)
  q_mean = ai.bsa.PoolTiles (q_tiles, q_valid)
  k_mean = ai.bsa.PoolTiles (k_tiles, k_valid)
  count, index = ai.bsa.SelectTiles
    <scale: float = @scale, top_k: int = @top_k, cdf_threshold: float = @cdf_threshold> (q_mean, k_mean)
  threshold = Constant <value_float: float = @cdf_threshold> ()
  no_mass = Constant <value = float {0}> ()
  uneven = Greater (threshold, no_mass)
  y_tiles = ai.bsa.AttendTiles <scale: float = @scale> (q_tiles, k_tiles, v_tiles, k_valid, count, index, uneven)
  Y = ai.bsa.UntileTokens <grid: ints = @grid_q, tile: ints = @tile_q> (y_tiles, Q)
}
"""

# The inverse of TileTokens: positions beyond the grid are dropped.
_UNTILE_TOKENS = """
UntileTokens <grid, tile> (Tiles, Like) => (X)
{
  flat = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  at0 = Constant <value_ints = [0]> ()
  Token, Valid = ai.bsa.TokenTable <grid: ints = @grid, tile: ints = @tile> ()
  token_list = Reshape (Token, flat)
  num_positions_axis = Shape (token_list)
  num_positions = Squeeze (num_positions_axis, at0)
  positions = Range (zero, num_positions, one)
  tokens = Shape <start = 2, end = 3> (Like)
  room = Add (tokens, one)                                # one more for the positions beyond the grid
  no_position = ConstantOfShape <value = int64[1] {0}> (room)
  position_or_more = ScatterElements (no_position, token_list, positions)
  position = Slice (position_or_more, at0, tokens)        # [S]
  lead = Shape <start = 0, end = 2> (Like)
  width = Shape <start = 3> (Like)
  by_position_shape = Concat <axis = 0> (lead, num_positions_axis, width)
  by_position = Reshape (Tiles, by_position_shape)
  X = Gather <axis = 2> (by_position, position)           # [B, H, S, D]
}
"""

_TEXTS = (_TOKEN_TABLE, _TILE_TOKENS, _POOL_TILES, _SELECT_TILES, _ATTEND_TILES, _UNTILE_TOKENS, _NODE)


def functions(opset: int) -> list[onnx.FunctionProto]:
    """Everything that a model using the node must carry; the node's own function comes last.

    Args:
        opset: version of the standard operators, that of the model.

    Raises:
        UsageError: the opset is not one of `OPSETS`.
        MissingExtraError: onnx is not installed.
    """
    if not isinstance(opset, int) or isinstance(opset, bool) or opset not in OPSETS:
        raise UsageError(
            must(
                "opset", f"be an integer from {OPSETS.start} to {OPSETS.stop - 1}", repr(opset), "Give for example 23."
            )
        )
    require_extra("onnx", "onnx")
    import onnx.parser

    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>'
    numbers = {"$MASS_SLACK": repr(MASS_SLACK), "$STEP_ELEMENTS": repr(STEP_ELEMENTS)}
    result = []
    for text in _TEXTS:
        for name, number in numbers.items():
            text = text.replace(name, number)
        result.append(onnx.parser.parse_function(head + text))
    return result


def node_attributes(
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    sparsity: float | None,
    cdf_threshold: float | None,
    scale: float,
) -> dict[str, int | float | list[int]]:
    """The attributes of one node.

    Args:
        grid_q, tile_q, grid_k, tile_k: token grids and tiles of queries and keys, (t, h, w).
        sparsity: keep the `max(1, floor((1 - sparsity) * Nk))` best key tiles; None: no criterion.
        cdf_threshold: keep the smallest set that reaches this softmax mass; None: no criterion.
        scale: factor of the scores.

    Raises:
        GridError: a grid or tile is not three positive integers.
        UsageError: neither criterion is given, or a number is out of its range.
    """
    shapes = {"grid_q": grid_q, "tile_q": tile_q, "grid_k": grid_k, "tile_k": tile_k}
    attributes: dict[str, int | float | list[int]] = {
        name: list(as_shape3(name, value)) for name, value in shapes.items()
    }
    if sparsity is None and cdf_threshold is None:
        raise UsageError(must("sparsity", "be given, or cdf_threshold, or both", "neither", "Give for example 0.9375."))
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise UsageError(must("sparsity", "be a number in [0, 1]", repr(sparsity)))
    if cdf_threshold is not None and not 0 < cdf_threshold <= 1:
        raise UsageError(must("cdf_threshold", "be a number in (0, 1]", repr(cdf_threshold)))
    if not math.isfinite(scale):
        raise UsageError(must("scale", "be a finite number", repr(scale)))
    attributes["scale"] = float(scale)
    attributes["top_k"] = 0 if sparsity is None else keep_count(num_tiles(grid_k, tile_k), sparsity)
    attributes["cdf_threshold"] = 0.0 if cdf_threshold is None else _threshold32(cdf_threshold)
    return attributes


def _threshold32(threshold: float) -> float:
    """A number in (0, 1) must not become 0 (not used) or 1 (take all) by rounding to fp32."""
    return threshold if threshold == 1 else min(max(threshold, 2.0**-126), 1 - 2.0**-24)
