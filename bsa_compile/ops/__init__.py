"""The ops: `torch.ops.bsa.{pool, select, attend, attend_backward, attention}` and what is built of them.

Importing this registers them. Neither Triton nor a GPU is needed until a CUDA tensor comes.
"""

from . import autograd, flops, libraries, ring  # noqa: F401  (they register what they define)
from .anchor import attention, ring_attention
from .functional import block_sparse_attention
from .registry import attend_implementations, how_to_get, register_attend

__all__ = [
    "attend_implementations",
    "attention",
    "block_sparse_attention",
    "how_to_get",
    "register_attend",
    "ring_attention",
]
