"""What ranks run: the same call on one process and on all of them, compared on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import bsa_compile
from bsa_compile import gating
from bsa_compile.grid import tile_counts
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.ops import block_sparse_attention
from bsa_compile.parallel.split import even, starts
from bsa_compile.policy import BSAPolicy
from tests.compile.support import CAPTION, CountCompiles, relative_error

from .pool import DEVICE

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 2, 3), chunk_3d_shape_k=(2, 2, 3))


@dataclass(frozen=True)
class Case:
    """One call of a small DiT.

    Attributes:
        grid: of the tokens.
        mesh: size of each dimension, by name.
        heads: of the model.
        batch: samples.
        cond: conditioning frames at the front; with `cached` they are encoded for a cache by a call of their own.
        policy: None: dense.
    """

    grid: tuple[int, int, int]
    mesh: dict[str, int]
    heads: int = 4
    batch: int = 1
    cond: int = 0
    cached: bool = False
    policy: BSAPolicy | None = POLICY
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mesh = "-".join(f"{n}{s}" for n, s in self.mesh.items())
        cond = f"-{'cached' if self.cached else 'cond'}{self.cond}" if self.cond else ""
        more = "".join(f"-{k}" for k in self.options)
        sparse = "" if self.policy is not None else "-dense"
        return f"{'x'.join(map(str, self.grid))}-{mesh}-h{self.heads}-b{self.batch}{cond}{sparse}{more}"

    @property
    def ranks(self) -> int:
        total = 1
        for size in self.mesh.values():
            total *= size
        return total


def device() -> torch.device:
    """Where this rank computes: on a GPU of its own with BSA_TEST_DEVICE=cuda; else, and outside a job, on the CPU."""
    on_gpu = DEVICE == "cuda" and dist.is_initialized()
    return torch.device("cuda", dist.get_rank()) if on_gpu else torch.device("cpu")


def mesh_of(case: Case) -> DeviceMesh:
    return init_device_mesh(DEVICE, tuple(case.mesh.values()), mesh_dim_names=tuple(case.mesh))


def model_of(heads: int, seed: int = 0, depth: int = 2) -> LongCatVideoTransformer3DModel:
    torch.manual_seed(seed)
    model = LongCatVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        hidden_size=16 * heads,
        depth=depth,
        num_heads=heads,
        caption_channels=CAPTION,
        adaln_tembed_dim=16,
        frequency_embedding_size=32,
        text_tokens_zero_pad=True,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1))
    return model.eval().to(device())


def inputs_of(case: Case, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    t, h, w = case.grid
    given = {
        "hidden_states": torch.randn(case.batch, 4, t, 2 * h, 2 * w - 1, generator=generator),  # an odd size: padded
        "timestep": torch.rand(case.batch, t, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(case.batch, 1, 5, CAPTION, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * case.batch),
    }
    return {name: x.to(device()) for name, x in given.items()}


def call(model: Any, case: Case, given: dict[str, Any]) -> Tensor:
    """The case's call, its cache filled by an earlier one."""
    if not case.cached:
        return model(**given, num_cond_latents=case.cond)
    front, rest = dict(given), dict(given)
    for name in ("hidden_states", "timestep"):
        axis = given[name].dim() - 3 if name == "hidden_states" else 1
        front[name] = given[name].narrow(axis, 0, case.cond)
        rest[name] = given[name].narrow(axis, case.cond, case.grid[0] - case.cond)
    _, cache = model(**front, return_kv=True, skip_crs_attn=True, **case.options)
    return model(**rest, num_cond_latents=case.cond, kv_cache_dict=cache)


@contextlib.contextmanager
def alone(model: LongCatVideoTransformer3DModel, policy: BSAPolicy | None) -> Iterator[None]:
    """Have the model attend as one process does, without a compiler."""

    def sparse(q: Tensor, k: Tensor, v: Tensor, *, grid_q: Any, grid_k: Any, role: str) -> Any:
        if role == "self" and grid_q[0] == 1:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert policy is not None
        return block_sparse_attention(
            q,
            k,
            v,
            grid_q=grid_q,
            grid_k=grid_k,
            tile_q=policy.chunk_3d_shape_q,
            tile_k=policy.chunk_3d_shape_k,
            sparsity=policy.sparsity,
            cdf_threshold=policy.cdf_threshold,
        )

    before = [b.attn.attention_fn for b in model.blocks]
    try:
        for block in model.blocks:
            if policy is not None:
                block.attn.attention_fn = sparse
        yield
    finally:
        for block, function in zip(model.blocks, before, strict=True):
            block.attn.attention_fn = function


def optimized(model: LongCatVideoTransformer3DModel, case: Case, **options: Any) -> Any:
    policy = BSAPolicy.dense() if case.policy is None else case.policy
    # A size of its own for every shape, as the pipeline has it: tracing symbolic sizes takes many times longer.
    options = {"backend": "eager", "dynamic": False, **options}
    return bsa_compile.optimize(model, policy, mesh=mesh_of(case), **options)


def forward(case: Case) -> tuple[float, list[tuple[int, int]]]:
    """Relative error of the output, and (rewritten, all) self-attention sites."""
    model, given = model_of(case.heads), inputs_of(case)
    with torch.no_grad():
        with alone(model, case.policy):
            expected = call(model, case, given)
        fast = optimized(model, case)
        out = call(fast, case, given)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    sites = [s for s in fast.report.sites if s.role != "cross"]
    return relative_error(out, expected), [(sum(s.rewritten for s in sites), len(sites))]


def gradients(case: Case, checkpointing: bool = False, **options: Any) -> dict[str, float]:
    """Relative errors of the weights' gradients (their mean over the ranks) and of the inputs'."""
    model, given = model_of(case.heads), inputs_of(case)
    model.gradient_checkpointing = checkpointing
    inputs = [given["hidden_states"].requires_grad_(), given["encoder_hidden_states"].requires_grad_()]

    def backward(called: Any) -> list[Tensor]:
        out = call(called, case, given)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        (out * towards).sum().backward()
        found = [p.grad for p in model.parameters()] + [x.grad for x in inputs]
        for x in (*model.parameters(), *inputs):
            x.grad = None
        return found

    with alone(model, case.policy):
        expected = backward(model)
    got = backward(optimized(model, case, **options))
    names = [*(n for n, _ in model.named_parameters()), "hidden_states", "encoder_hidden_states"]
    errors = {}
    for name, mine, wanted in zip(names, got, expected, strict=True):
        if "." in name:  # a weight
            mine = mine.clone()
            dist.all_reduce(mine)
            mine /= dist.get_world_size()
        errors[name] = relative_error(mine, wanted)
    return errors


def recomputed_under_another_size(case: Case) -> float:
    """A call of another size between forward and a backward pass that repeats the blocks."""
    model, given = model_of(case.heads), inputs_of(case)
    model.gradient_checkpointing = True
    weight = model.blocks[0].attn.qkv.weight
    with alone(model, case.policy):
        (expected,) = torch.autograd.grad(call(model, case, given).square().mean(), weight)
    fast = optimized(model, case)
    loss = call(fast, case, given).square().mean()
    other = dataclasses.replace(case, grid=(case.grid[0], case.grid[1] + 2, case.grid[2]))
    with torch.no_grad():
        call(fast, other, inputs_of(other))
    (got,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(got)
    return relative_error(got / dist.get_world_size(), expected)


def with_lora(case: Case, path: str) -> tuple[float, float]:
    """Errors with a LoRA enabled after optimize, and disabled again."""
    model, given = model_of(case.heads), inputs_of(case)
    model.load_lora(path, "style")
    with torch.no_grad():
        with alone(model, case.policy):
            plain = call(model, case, given)
            model.enable_loras(["style"])
            styled = call(model, case, given)
            model.disable_all_loras()
        assert relative_error(styled, plain) > 1e-2
        fast = optimized(model, case)
        fast.enable_loras(["style"])
        errors = [relative_error(call(fast, case, given), styled)]
        fast.disable_all_loras()
        errors.append(relative_error(call(fast, case, given), plain))
    return errors[0], errors[1]


def sharded_cache(case: Case) -> list[tuple[int, int]]:
    """Tokens of each frame in this rank's cache, and of each frame of the whole grid."""
    model, given = model_of(case.heads), inputs_of(case)
    fast = optimized(model, case)
    with torch.no_grad():
        _, cache = fast(**given, return_kv=True, skip_crs_attn=True)
    return [(k.shape[2] // case.grid[0], case.grid[1] * case.grid[2]) for k, _ in cache.values()]


def switching(case: Case) -> tuple[float, float, float]:
    """Errors block-sparse, dense after disable_bsa(), and block-sparse again."""
    model, given = model_of(case.heads), inputs_of(case)
    with torch.no_grad():
        with alone(model, case.policy):
            sparse = call(model, case, given)
        dense = call(model, case, given)
        assert relative_error(dense, sparse) > 1e-3
        fast = optimized(model, case)
        first = relative_error(call(fast, case, given), sparse)
        fast.disable_bsa()
        second = relative_error(call(fast, case, given), dense)
        fast.enable_bsa()
        return first, second, relative_error(call(fast, case, given), sparse)


def compiled(case: Case, compiler: str, regional: bool) -> tuple[float, float, int]:
    """Errors of output and one gradient, and graphs, of one call compiled without a graph break."""
    model, given = model_of(case.heads), inputs_of(case)
    weight = model.blocks[1].attn.qkv.weight
    with alone(model, case.policy):
        expected = call(model, case, given)
    (wanted,) = torch.autograd.grad(expected.square().mean(), weight)
    fast = optimized(model, case, backend=compiler, regional=regional, fullgraph=True)
    with CountCompiles() as graphs:
        out = call(fast, case, given)
        (got,) = torch.autograd.grad(out.square().mean(), weight)
    dist.all_reduce(got)
    error = relative_error(got / dist.get_world_size(), wanted)
    return relative_error(out.detach(), expected.detach()), error, graphs.count


@contextlib.contextmanager
def selections_kept() -> Iterator[list[tuple[Tensor, ...]]]:
    """Pooled inputs and lists of every selection made inside the block, in order."""
    module = importlib.import_module("bsa_compile.kernels.select") if DEVICE == "cuda" else gating
    original, found = module.select, []

    def select(q_pooled: Tensor, k_pooled: Tensor, *criteria: Any) -> tuple[Tensor, Tensor]:
        counts, indices = original(q_pooled, k_pooled, *criteria)
        found.append((q_pooled.cpu(), k_pooled.cpu(), counts.cpu(), indices.cpu()))
        return counts, indices

    module.select = select
    try:
        yield found
    finally:
        module.select = original


def selections(case: Case) -> tuple[int, int, float]:
    """How this rank's selections differ from those of one process.

    Returns:
        Rows compared, rows that differ, and of those the largest relative distance of two scores that changed places.
    """
    model, given = model_of(case.heads), inputs_of(case)
    with torch.no_grad():
        with alone(model, case.policy), selections_kept() as one:
            call(model, case, given)
        fast = optimized(model, case)
        with selections_kept() as mine:
            call(fast, case, given)
    assert len(mine) == len(one) == len(model.blocks)
    ranks, plan = fast._bsa_runtime.context.ranks, fast._bsa_runtime.context.plan
    heads = starts(even(case.heads, ranks.ulysses.size))[ranks.ulysses.index :][:2]
    rows = different = 0
    worst = 0.0
    for (q, k, counts, indices), (_, _, my_counts, my_indices) in zip(one, mine, strict=True):
        at = torch.arange(q.shape[2]).unflatten(0, tile_counts(case.grid, case.policy.chunk_3d_shape_q))
        tile, bounds = case.policy.chunk_3d_shape_q[plan.split.axis], plan.split.bounds
        first, last = (-(-b // tile) for b in bounds[ranks.ring.index : ranks.ring.index + 2])
        at = at.narrow(plan.split.axis, first, last - first).flatten()
        counts, indices = (x[:, heads[0] : heads[1]][:, :, at] for x in (counts, indices))
        scores = torch.matmul(q[:, heads[0] : heads[1]][:, :, at].double(), k[:, heads[0] : heads[1]].double().mT)
        assert torch.equal(counts, my_counts)
        for place in (indices != my_indices).any(-1).nonzero().tolist():
            row = scores[tuple(place)]
            here, there = (set(x[tuple(place)].tolist()) for x in (indices, my_indices))
            pair = row[list(here ^ there)]
            worst = max(worst, float((pair.max() - pair.min()) / row.abs().max()))
            different += 1
        rows += counts.numel()
    return rows, different, worst


def gradients_whole(case: Case) -> dict[str, float]:
    """`gradients` with the model in one graph, checkpointed blocks in graphs of their own inside it."""
    return gradients(case, True, backend="aot_eager", regional=False, fullgraph=True)


def under_autocast(case: Case) -> tuple[float, str]:
    """Error of the output, and its dtype, in a bf16 autocast region."""
    model, given = model_of(case.heads), inputs_of(case)
    fast = optimized(model, case)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        with alone(model, case.policy):
            expected = call(model, case, given)
        out = call(fast, case, given)
    return relative_error(out, expected), str(out.dtype)
