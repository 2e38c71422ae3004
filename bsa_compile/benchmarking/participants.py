"""Who is measured: our kernels, dense attention of several makers, and other block-sparse kernels.

A participant is made for a problem and gives calls to be timed. *Kernel* calls get their inputs as the kernel wants
them, in its own order of tokens: ours reads raster order, the others have tiles as contiguous blocks. *Op* calls are
the whole thing: raster q, k and v in, raster output out, with selection and every reordering.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import one_line
from ..ops import block_sparse_attention, libraries, registry, tile_order
from ..selection import BlockSelection
from .problem import Problem

Results = tuple[Tensor, "Tensor | None"]
Gradients = tuple[Tensor, Tensor, Tensor]
RASTER, BLOCKS, BLOCKS_BSHD = "raster order", "tile order [B, H, S, D]", "tile order [B, S, H, D]"


class Absent(Exception):
    """The participant cannot take part here; the text says why."""


@dataclass(frozen=True)
class Participant:
    """Calls of one participant.

    Attributes:
        order: `RASTER`, `BLOCKS` or `BLOCKS_BSHD`: how it takes and returns tokens.
        dense: whether it attends to everything.
        forward: the kernel; out and LSE in its order, None for an LSE that it does not give.
        backward: the kernel's gradients for a gradient in its order, None where it has none.
        op_forward, op_backward: the whole op, None where that is the same or does not exist.
        note: what to know about the figures.
    """

    order: str
    forward: Callable[[], Results]
    backward: Callable[[Tensor], Gradients] | None = None
    op_forward: Callable[[], Any] | None = None
    op_backward: Callable[[], Any] | None = None
    dense: bool = False
    note: str = ""


def into(problem: Problem, x: Tensor, order: str) -> Tensor:
    """A `[1, H, S, D]` tensor of the problem in a participant's order, contiguous."""
    if order == RASTER:
        return x.contiguous()
    setting = problem.setting
    return tile_order.blocks_of(x, setting.grid, setting.tile, "raster", order == BLOCKS)


def back(problem: Problem, x: Tensor, order: str) -> Tensor:
    """A participant's tensor as `[1, H, S, D]` in raster order."""
    if order == RASTER:
        return x
    setting = problem.setting
    return tile_order.tokens_of(x, setting.grid, setting.tile, "raster", order == BLOCKS)


def lse_back(problem: Problem, lse: Tensor, order: str) -> Tensor:
    """A participant's LSE as `[1, H, S]` in raster order."""
    setting = problem.setting
    return lse if order == RASTER else tile_order.lse_tokens(lse, setting.grid, setting.tile, "raster")


def native(problem: Problem, deterministic: bool = False) -> Participant:
    """Our own kernels."""
    tail = (*problem.grids, problem.setting.scale, "raster", "native")
    saved = torch.ops.bsa.attend(*problem.qkv, problem.counts, problem.lists, *tail)

    def forward() -> Results:
        return torch.ops.bsa.attend(*problem.qkv, problem.counts, problem.lists, *tail)

    def backward(grad: Tensor) -> Gradients:
        with _deterministic() if deterministic else nullcontext():
            return torch.ops.bsa.attend_backward(grad, None, *problem.qkv, *saved, problem.counts, problem.lists, *tail)

    note = "bit-equal gradients (torch.use_deterministic_algorithms)" if deterministic else ""
    return Participant(RASTER, forward, backward, _whole_op(problem, "native"), note=note)


def dense_sdpa(problem: Problem, backend: SDPBackend | None) -> Participant:
    """torch's dense attention; None leaves the choice to torch."""
    if problem.device.type != "cuda" and backend is not None:
        raise Absent(f"it needs a CUDA GPU, got {problem.device.type}")
    q, k, v = problem.qkv

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return _by_autograd(problem, RASTER, (q, k, v), lambda *x: (attend(*x), None), dense=True)


def flex_attention(problem: Problem) -> Participant:
    """FlexAttention, compiled, with the lists as a `BlockMask` of whole blocks."""
    setting = problem.setting
    if problem.device.type != "cuda":
        raise Absent(f"it needs a CUDA GPU, got {problem.device.type}")
    if setting.volume % 128:
        raise Absent(f"its blocks are multiples of 128 tokens at this head_dim, got {setting.volume}")
    _needs_whole_tiles(problem)
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    dense = BlockSelection(problem.counts, problem.lists, setting.num_tiles).to_dense()
    wide = BlockSelection.from_dense(dense)
    none = torch.zeros_like(wide.kv_num_blocks)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(wide.kv_indices),
        wide.kv_num_blocks,
        torch.where(wide.used, wide.kv_indices, 0),
        BLOCK_SIZE=(setting.volume, setting.volume),
        seq_lengths=(setting.tokens, setting.tokens),
    )
    torch.compiler.reset()  # every shape is compiled anew, and Dynamo gives up after a few of one function
    compiled = torch.compile(flex, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Results:
        return compiled(q, k, v, block_mask=mask, scale=setting.scale), None

    blocks = _blocks(problem, BLOCKS)
    return _by_autograd(problem, BLOCKS, blocks, attend, note="the transposed lists of its BlockMask are not timed")


def flash_attn_4(problem: Problem) -> Participant:
    """FlashAttention-4, block-sparse."""
    _check("flash-attn-4", problem)
    setting = problem.setting
    blocks = _blocks(problem, BLOCKS_BSHD)
    lists = libraries.fa4_lists(problem.counts, problem.lists, setting.volume)
    saved = libraries.fa4_forward(*blocks, lists, setting.scale)

    def backward(grad: Tensor) -> Gradients:
        turned = libraries.fa4_transposed(problem.counts, problem.lists, setting.num_tiles, setting.volume)
        return libraries.fa4_backward(grad, None, *blocks, *saved, turned, setting.scale)

    return Participant(
        BLOCKS_BSHD,
        lambda: libraries.fa4_forward(*blocks, lists, setting.scale),
        backward,
        _whole_op(problem, "flash-attn-4"),
        _whole_backward(problem, "flash-attn-4"),
        note="its backward includes building the transposed lists in plain torch",
    )


def flash_attn_4_given_lists(problem: Problem) -> Participant:
    """As `flash_attn_4`, with the transposed lists of the backward at hand."""
    whole = flash_attn_4(problem)
    setting = problem.setting
    blocks = _blocks(problem, BLOCKS_BSHD)
    out, lse = whole.forward()
    turned = libraries.fa4_transposed(problem.counts, problem.lists, setting.num_tiles, setting.volume)
    return Participant(
        BLOCKS_BSHD,
        whole.forward,
        lambda grad: libraries.fa4_backward(grad, None, *blocks, out, lse, turned, setting.scale),  # type: ignore[arg-type]
        note="its backward finds the transposed lists made, which is not timed",
    )


def flash_attn_4_dense(problem: Problem) -> Participant:
    """FlashAttention-4, dense."""
    _installed("flash-attn-4")
    if problem.device.type != "cuda":
        raise Absent(f"it needs a CUDA GPU, got {problem.device.type}")
    from flash_attn.cute import flash_attn_func

    blocks = tuple(x.transpose(1, 2).contiguous() for x in problem.qkv)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Results:
        out, *_ = flash_attn_func(q, k, v, softmax_scale=problem.setting.scale)
        return out.transpose(1, 2), None

    grad_of = _by_autograd(problem, RASTER, blocks, attend, dense=True)
    backward = grad_of.backward
    assert backward is not None

    def gradients(grad: Tensor) -> Gradients:
        dq, dk, dv = (x.transpose(1, 2) for x in backward(grad))
        return dq, dk, dv

    return Participant(RASTER, grad_of.forward, gradients, dense=True)


def cudnn_frontend(problem: Problem) -> Participant:
    """The cuDNN frontend's block-sparse attention; with a fixed count, as it is fastest."""
    _check("cudnn", problem)
    setting = problem.setting
    q, k, v = _blocks(problem, BLOCKS)
    lists, volume, scale = problem.lists, setting.volume, setting.scale
    out, lse = libraries.cudnn_forward(q, k, v, None, lists, volume, scale)
    return Participant(
        BLOCKS,
        lambda: libraries.cudnn_forward(q, k, v, None, lists, volume, scale),
        lambda grad: libraries.cudnn_backward(grad, q, k, v, out, lse, None, lists, volume, scale),
        _whole_op(problem, "cudnn"),
        _whole_backward(problem, "cudnn"),
    )


def cudnn_frontend_splits(problem: Problem) -> Participant:
    """As `cudnn_frontend`, forward only, with the library's rule for splitting the lists."""
    _check("cudnn", problem)
    setting = problem.setting
    if setting.volume != 64:
        raise Absent(f"the rule is for blocks of 64 tokens, got {setting.volume}")
    q, k, v = _blocks(problem, BLOCKS)
    rest = (problem.lists, setting.volume, setting.scale)
    return Participant(BLOCKS, lambda: libraries.cudnn_forward(q, k, v, None, *rest, splits="auto"))


OURS = "bsa_compile"
DETERMINISTIC, GIVEN_LISTS = f"{OURS}, deterministic", "FlashAttention-4, lists given"
BACKWARD_ONLY = (DETERMINISTIC, GIVEN_LISTS)  # their forward is that of another participant
# What is built in comes first, so that a library that breaks the GPU's context costs the least.
SPARSE: dict[str, Callable[[Problem], Participant]] = {
    OURS: native,
    DETERMINISTIC: functools.partial(native, deterministic=True),
    "cuDNN frontend BSA": cudnn_frontend,
    "cuDNN frontend BSA, kv_splits auto": cudnn_frontend_splits,
    "FlexAttention": flex_attention,
    "FlashAttention-4": flash_attn_4,
    GIVEN_LISTS: flash_attn_4_given_lists,
}
DENSE: dict[str, Callable[[Problem], Participant]] = {
    "dense cuDNN": functools.partial(dense_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "dense FlashAttention-2": functools.partial(dense_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "dense FlashAttention-4": flash_attn_4_dense,
}
DENSE_ON_CPU: dict[str, Callable[[Problem], Participant]] = {"dense torch": functools.partial(dense_sdpa, backend=None)}


def participants(device: torch.device, dense: bool) -> dict[str, Callable[[Problem], Participant]]:
    """Makers by name, in the order in which they are measured."""
    if not dense:
        return SPARSE
    return {**SPARSE, **(DENSE_ON_CPU if device.type == "cpu" else {}), **DENSE}


def reason(exc: BaseException) -> str:
    """Why a participant failed, in one line."""
    return str(exc) if isinstance(exc, Absent) else one_line(exc)


def _whole_op(problem: Problem, implementation: str) -> Callable[[], Any]:
    setting = problem.setting

    def call() -> Any:
        if setting.lists == "random" or setting.keep is not None:  # lists that no sparsity gives: gate, then attend
            problem.select()
            where = (*problem.grids, setting.scale, "raster", implementation)
            return torch.ops.bsa.attend(*problem.qkv, problem.counts, problem.lists, *where)
        return block_sparse_attention(
            *problem.qkv,
            grid_q=setting.grid,
            tile_q=setting.tile,
            sparsity=setting.sparsity,
            implementation=implementation,
        )

    return call


def _whole_backward(problem: Problem, implementation: str) -> Callable[[], Any]:
    """Raster tensors in, raster gradients out."""
    tail = (*problem.grids, problem.setting.scale, "raster")
    lists = (problem.counts, problem.lists)
    out, lse = torch.ops.bsa.attend(*problem.qkv, *lists, *tail, "native")
    return lambda: torch.ops.bsa.attend_backward(
        problem.grad, None, *problem.qkv, out, lse, *lists, *tail, implementation
    )


def _by_autograd(
    problem: Problem,
    order: str,
    inputs: tuple[Tensor, ...],
    attend: Callable[..., Results],
    dense: bool = False,
    note: str = "",
) -> Participant:
    """A participant whose backward is autograd's, of a graph that is kept."""

    @functools.cache
    def graph() -> tuple[list[Tensor], Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            return leaves, attend(*leaves)[0]

    def backward(grad: Tensor) -> Gradients:
        leaves, out = graph()
        dq, dk, dv = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        return dq, dk, dv

    return Participant(order, lambda: attend(*inputs), backward, dense=dense, note=note)


def _blocks(problem: Problem, order: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (into(problem, x, order) for x in problem.qkv)
    return q, k, v


def _installed(name: str) -> None:
    found = next(library for library in registry.declared() if library.name == name)
    if not found.installed:
        raise Absent(f"{found.distribution} is not installed: pip install 'bsa-compile[{found.extra}]'")


def _check(name: str, problem: Problem) -> None:
    _installed(name)
    found = next(library for library in registry.declared() if library.name == name)
    objection = found.objection(*problem.qkv, *problem.grids, "raster")
    if objection is not None:
        raise Absent(objection)


def _needs_whole_tiles(problem: Problem) -> None:
    if not problem.setting.whole_tiles:
        raise Absent("it has no partial tiles, and the tile does not divide the grid")


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms without filling uninitialised memory, which would be timed as well."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
