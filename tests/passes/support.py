"""Small video transformers, and how to capture and inspect their graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bsa_compile.passes import rewrite
from bsa_compile.passes.calls import qualified_name
from bsa_compile.passes.regions import region
from bsa_compile.policy import BSAPolicy
from bsa_compile.report import Report

HEADS, WIDTH = 2, 32
ALL = BSAPolicy(sparsity=0.0, chunk_3d_shape_q=(2, 2, 2), chunk_3d_shape_k=(2, 2, 2))
HALF = BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(2, 2, 2), chunk_3d_shape_k=(2, 2, 2))

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfAttention(nn.Module):
    """Attention over one sequence `[B, S, C]`.

    Args:
        attend: what attends; q, k, v are `[B, H, S, D]`, or `[B, S, H, D]` with `bshd`.
        bshd: layout of q, k, v.
    """

    def __init__(self, attend: Attend = F.scaled_dot_product_attention, bshd: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.attend = attend
        self.bshd = bshd

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, HEADS, width // HEADS)
        q, k, v = qkv.unbind(2)
        if not self.bshd:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        out = self.attend(q, k, v)
        if not self.bshd:
            out = out.transpose(1, 2)
        return self.proj(out.reshape(batch, tokens, width))


class Opaque(nn.Module):
    """Self-attention by `nn.MultiheadAttention`."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.need_weights = False

    def forward(self, x):
        return self.mha(x, x, x, need_weights=self.need_weights)[0]


class CrossAttention(nn.Module):
    """Attention of one sequence to another."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, -1).transpose(1, 2)
        k, v = (z.reshape(batch, text.shape[1], HEADS, -1).transpose(1, 2) for z in self.kv(text).chunk(2, dim=-1))
        return F.scaled_dot_product_attention(query=q, key=k, value=v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Self-attention, cross-attention to a text where there is one, MLP."""

    def __init__(self, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = SelfAttention() if attn is None else attn
        self.cross = CrossAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm(x))
        if text is not None:
            x = x + self.cross(x, text)
        return x + self.mlp(x)


def _call(block: nn.Module, x: Tensor, text: Tensor | None) -> Tensor:
    return block(x) if text is None else block(x, text)


class Video(nn.Module):
    """Patch embedding (Conv3d) and blocks; tokens `[B, THW, C]`.

    Args:
        blocks: the blocks, each called with (x, text).
        call: how a block is called, for checkpointing and the like.
    """

    def __init__(
        self, *blocks: nn.Module, depth: int = 2, call: Callable[..., Tensor] | None = None, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, patch, patch), (1, patch, patch))
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(depth)])
        self.call = call

    def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            call = self.call or _call
            x = call(block, x, text)
        return x


def latents(t: int = 4, h: int = 4, w: int = 6, batch: int = 1) -> Tensor:
    """Latents whose 1x2x2 patches form the grid (t, h, w)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, t, 2 * h, 2 * w, generator=generator)


def text_of(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=generator)


def capture(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> fx.GraphModule:
    """The one graph that Dynamo makes of a call."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    return graphs[-1]


class Recorder:
    """A Dynamo backend that rewrites and then runs the graph as it is.

    Attributes:
        before, after: the graph modules of every compilation.
        reports: their reports.
    """

    def __init__(self, policy: BSAPolicy = ALL, **options: Any) -> None:
        self.policy = policy
        self.options = options
        self.before: list[fx.GraphModule] = []
        self.after: list[fx.GraphModule] = []
        self.reports: list[Report] = []

    def __call__(self, graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        after, report = rewrite(graph, self.policy, **self.options)
        self.before.append(graph)
        self.after.append(after)
        self.reports.append(report)
        return after.forward

    def run(self, model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Any:
        return torch.compile(model, backend=self, dynamic=dynamic, fullgraph=True)(*args, **kwargs)


def ops(module: fx.GraphModule) -> list[str]:
    """Qualified names of all functions called, in order, subgraphs included."""
    names = []
    for node in module.graph.nodes:
        inside = region(module, node)
        for body in inside.bodies if inside is not None else ():
            names += ops(body.module)
        if node.op == "call_function":
            names.append(qualified_name(node.target))
    return names


def count(module: fx.GraphModule, name: str) -> int:
    return ops(module).count(name)


def attention_of(module: fx.GraphModule) -> fx.Node:
    """The first block-sparse attention."""
    return next(n for n in module.graph.nodes if n.op == "call_function" and qualified_name(n.target) == "bsa::attend")


SDPA, ATEN_SDPA = "torch._C._nn.scaled_dot_product_attention", "aten::scaled_dot_product_attention"


def outcomes(report: Report) -> list[tuple[str, str, str]]:
    """(module, role, reason) of every site."""
    return [(s.module, s.role, s.reason) for s in report.sites]


def report_of(model: Callable[..., Any], *args: Any, policy: BSAPolicy = ALL, **options: Any) -> Report:
    """The report of the pass on the graph of one call."""
    return rewrite(capture(model, *args), policy, **options)[1]


def reasons(report: Report) -> list[str]:
    """What became of every site."""
    return [s.reason for s in report.sites]
