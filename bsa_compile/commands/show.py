"""`bsa-compile show`: a picture of a block mask, one panel per head."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_compile.capture import AttentionInputs, capture_attention, select_tiles
from bsa_compile.commands import common, console
from bsa_compile.errors import PolicyError, UsageError, must, require_extra
from bsa_compile.files import check_writable
from bsa_compile.grid import TokenGrid, num_tiles
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.models.longcat.rope import rope_tables, rotate
from bsa_compile.ops.validate import check_head_dim
from bsa_compile.policy import BSAPolicy
from bsa_compile.report import REASONS

TEXT_TOKENS = 16
MAX_PAIRS = 1 << 28  # tile pairs of all heads; a picture has fewer pixels anyway


def run(args: argparse.Namespace) -> int:
    """Select tiles for random or a model's queries and keys, and draw them."""
    require_extra("matplotlib", "viz")
    output = check_writable(args.output, "--output")
    if output.suffix.lower() != ".png":
        raise UsageError(must("--output", "end in .png", repr(args.output)))
    device = common.resolve_device(args.device)
    grid = common.check_grid(args.grid)
    with console.Progress(2) as progress:
        if args.checkpoint is None:
            progress("making queries and keys")
            check_head_dim(args.head_dim)
            policy = common.chosen_policy(args)
            check_size(args.heads, grid, policy)
            inputs = structured_inputs(grid, args.heads, args.head_dim, args.seed, device)
            title, module = f"random structured q and k, head_dim {args.head_dim}", ""
        else:
            folder = common.find_checkpoint(args.checkpoint)
            progress(f"running {folder} up to block {args.block}")
            meta = common.meta_model(folder)
            policy = common.chosen_policy(args, meta)
            check_size(meta.config.num_heads, grid, policy)
            if not 0 <= args.block < meta.config.depth:
                raise UsageError(must("--block", f"lie in 0..{meta.config.depth - 1}", args.block))
            model = LongCatVideoTransformer3DModel.from_pretrained(folder, device=device)
            call = common.model_inputs(model, grid, text_tokens=TEXT_TOKENS, seed=args.seed)
            inputs = capture_attention(model, args.block, lambda: model(**call))
            title, module = f"{folder.name}, block {args.block}, timestep 1000", f"blocks.{args.block}.attn"
        progress("drawing")
        result = save_picture(inputs, policy, module, title, output)
    if args.json:
        console.put_json({**result, "device": common.describe_device(device), "versions": common.versions()}, "-")
    else:
        kept = ", ".join(console.percent(share) for share in result["kept_per_head"])
        print(f"wrote {output}: {console.percent(result['kept'])} of tile pairs kept (by head: {kept})")
    return 0


def check_size(heads: int, grid: TokenGrid, policy: BSAPolicy) -> None:
    """Refuse what would only run out of memory."""
    pairs = heads * num_tiles(grid.shape, policy.chunk_3d_shape_q) * num_tiles(grid.shape, policy.chunk_3d_shape_k)
    if pairs > MAX_PAIRS:
        got = f"{pairs:,} in {heads} heads"
        raise UsageError(must("the picture", f"have at most {MAX_PAIRS:,} tile pairs", got, "Give a smaller grid."))


def save_picture(inputs: AttentionInputs, policy: BSAPolicy, module: str, title: str, path: Path) -> dict[str, Any]:
    """Draw what a policy selects for one site.

    Returns:
        JSON object: grids, tiles, criteria, and the share of tile pairs kept.

    Raises:
        PolicyError: the policy keeps the site dense.
    """
    from bsa_compile.viz import block_mask_figure, save_figure

    site = policy.resolve(
        module=module,
        role=inputs.role,
        grid_q=inputs.grid_q,
        grid_k=inputs.grid_k,
        is_image=inputs.grid_q[0] == 1 and inputs.role == "self",
    )
    if site.dense:
        why = REASONS[site.dense] + (f" ({site.detail})" if site.detail else "")
        raise PolicyError(must("policy", "make this site block-sparse", f"a dense one: {why}"))
    selection = select_tiles(inputs, site)
    criteria = [f"sparsity {site.sparsity:g}"] if site.sparsity is not None else []
    if site.cdf_threshold is not None:
        criteria.append(f"cdf threshold {site.cdf_threshold:g}")
    shapes: dict[str, Any] = {
        "grid_q": inputs.grid_q,
        "tile_q": site.chunk_3d_shape_q,
        "grid_k": inputs.grid_k,
        "tile_k": site.chunk_3d_shape_k,
    }
    figure = block_mask_figure(selection, title=f"{title}; {', '.join(criteria)}", **shapes)
    save_figure(figure, path)
    per_head = selection.kv_num_blocks.double().mean((0, 2)) / selection.num_kv_tiles
    return {
        "picture": str(path),
        "role": inputs.role,
        **{name: list(value) for name, value in shapes.items()},
        "sparsity": site.sparsity,
        "cdf_threshold": site.cdf_threshold,
        "kept": selection.density,
        "kept_per_head": per_head.tolist(),
    }


def structured_inputs(grid: TokenGrid, heads: int, head_dim: int, seed: int, device: torch.device) -> AttentionInputs:
    """Random q and k that look like a video model's: smooth over the grid, alike, and rotated by RoPE.

    Heads differ in how far their content reaches and how much position counts.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rope = rope_tables(grid.shape, head_dim, torch.device("cpu"))
    q = torch.empty(1, heads, grid.num_tokens, head_dim)
    k = torch.empty_like(q)
    for head in range(heads):
        reach = 2 + 3 * (head % 4)  # tokens over which content stays alike
        coarse = normal(1, head_dim, *(math.ceil(size / reach) + 1 for size in grid.shape))
        content = F.interpolate(coarse, size=grid.shape, mode="trilinear", align_corners=True)
        base = content.flatten(2).transpose(1, 2)[0]  # [S, D]
        place = normal(head_dim) * (0.5 + 0.5 * (head % 3))
        for x in (q, k):
            x[0, head] = base + place + 0.3 * normal(*base.shape)
    q, k = (rotate(x, rope).to(device) for x in (q, k))
    return AttentionInputs(q, k, grid.shape, grid.shape, "self")
