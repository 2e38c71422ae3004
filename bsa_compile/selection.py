"""Block selections: which key tiles each query tile attends to.

In FlexAttention's terms: `kv_num_blocks` counts and `kv_indices` lists, left-packed and ascending; what lies beyond a
row's count is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from .errors import SelectionError, must
from .grid import num_tiles, tile_volume, valid_positions


@dataclass(frozen=True)
class BlockSelection:
    """Key tiles per query tile.

    Attributes:
        kv_num_blocks: `[B, H, Nq]` int32, how many key tiles each query tile attends to.
        kv_indices: `[B, H, Nq, Kmax]` int32, which ones: ascending, left-packed; the tail is never read.
        num_kv_tiles: Nk, the number of key tiles.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    num_kv_tiles: int

    def __post_init__(self) -> None:
        counts, indices = self.kv_num_blocks, self.kv_indices
        if counts.dtype != torch.int32 or indices.dtype != torch.int32:
            raise SelectionError(must("kv_num_blocks and kv_indices", "be int32", f"{counts.dtype}, {indices.dtype}"))
        if counts.dim() != 3 or indices.dim() != 4 or indices.shape[:3] != counts.shape:
            raise SelectionError(
                must(
                    "kv_indices",
                    "be [B, H, Nq, Kmax] with kv_num_blocks [B, H, Nq]",
                    f"{tuple(indices.shape)} and {tuple(counts.shape)}",
                )
            )

    @property
    def used(self) -> Tensor:
        """`[B, H, Nq, Kmax]` bool: which entries of `kv_indices` count."""
        slots = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        return slots < self.kv_num_blocks[..., None]

    def validate(self) -> None:
        """Check counts, bounds and order by reading the tensors (synchronises with the device).

        Raises:
            SelectionError: a count or an index is out of range, or a row is not strictly ascending.
        """
        counts, width = self.kv_num_blocks, self.kv_indices.shape[-1]
        if bool(((counts < 0) | (counts > width)).any()):
            raise SelectionError(
                must("kv_num_blocks", f"lie in [0, {width}]", f"{int(counts.min())}..{int(counts.max())}")
            )
        used = self.used
        bad = used & ((self.kv_indices < 0) | (self.kv_indices >= self.num_kv_tiles))
        if bool(bad.any()):
            raise SelectionError(
                must("kv_indices", f"lie in [0, {self.num_kv_tiles})", str(int(self.kv_indices[bad][0])))
            )
        steps_ok = self.kv_indices[..., 1:] > self.kv_indices[..., :-1]
        if not bool((steps_ok | ~used[..., 1:]).all()):
            raise SelectionError(must("kv_indices", "ascend strictly within a row", "a row that does not"))

    def to_dense(self) -> Tensor:
        """`[B, H, Nq, Nk]` bool."""
        mask = torch.zeros(
            *self.kv_num_blocks.shape, self.num_kv_tiles + 1, dtype=torch.bool, device=self.kv_indices.device
        )
        slots = torch.where(self.used, self.kv_indices, self.num_kv_tiles).long()
        return mask.scatter_(-1, slots, True)[..., :-1]

    @classmethod
    def from_dense(cls, mask: Tensor, width: int | None = None) -> BlockSelection:
        """Pack a `[B, H, Nq, Nk]` bool mask; `width` is Kmax, by default Nk. The unused tail holds Nk."""
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise SelectionError(must("mask", "be bool [B, H, Nq, Nk]", f"{mask.dtype} {tuple(mask.shape)}"))
        num_kv = mask.shape[-1]
        columns = torch.arange(num_kv, device=mask.device, dtype=torch.int32)
        packed = torch.where(mask, columns, num_kv).sort(dim=-1).values
        counts = mask.sum(-1, dtype=torch.int32)
        return cls(counts, packed[..., :width].contiguous().to(torch.int32), num_kv)

    def transposed(self) -> BlockSelection:
        """Query tiles per key tile: the selection of the transposed mask."""
        return BlockSelection.from_dense(self.to_dense().transpose(-1, -2).contiguous())

    @property
    def density(self) -> float:
        """Fraction of (query tile, key tile) pairs kept (synchronises with the device)."""
        return float(self.kv_num_blocks.double().mean()) / self.num_kv_tiles

    def to_block_mask(
        self,
        grid_q: Sequence[int],
        tile_q: Sequence[int],
        grid_k: Sequence[int],
        tile_k: Sequence[int],
    ) -> BlockMask:
        """As FlexAttention's `BlockMask` over tokens in padded tile order.

        Its `mask_mod` hides padding and repeats the selection, because eager `flex_attention` asks `mask_mod` alone and
        does not look at the block lists.
        """
        device = self.kv_indices.device
        kept = self.to_dense()
        dense = BlockSelection.from_dense(kept)  # BlockMask wants rows as wide as there are key tiles
        indices = torch.where(dense.used, dense.kv_indices, 0)
        valid_q = valid_positions(grid_q, tile_q, device).flatten()
        valid_k = valid_positions(grid_k, tile_k, device).flatten()
        volume_q, volume_k = tile_volume(tile_q), tile_volume(tile_k)

        def selected(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return kept[b, h, q_idx // volume_q, kv_idx // volume_k] & valid_q[q_idx] & valid_k[kv_idx]

        selected.bsa_whole_tiles = True  # type: ignore[attr-defined]
        return BlockMask.from_kv_blocks(
            dense.kv_num_blocks,
            indices,
            BLOCK_SIZE=(volume_q, volume_k),
            mask_mod=selected,
            seq_lengths=(
                num_tiles(grid_q, tile_q) * volume_q,
                num_tiles(grid_k, tile_k) * volume_k,
            ),
        )

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockSelection:
        """Back from a `BlockMask` that keeps or drops whole tiles.

        Raises:
            SelectionError: its partial blocks are masked by a function we cannot see through.
        """
        whole = block_mask.mask_mod is noop_mask or getattr(block_mask.mask_mod, "bsa_whole_tiles", False)
        if not whole and bool((block_mask.kv_num_blocks > 0).any()):
            raise SelectionError(
                must(
                    "block_mask",
                    "keep or drop whole blocks",
                    f"partial blocks with mask_mod {getattr(block_mask.mask_mod, '__name__', block_mask.mask_mod)!r}",
                    "Pass whole blocks as full_kv_num_blocks and full_kv_indices.",
                )
            )
        return cls.from_dense(block_mask.to_dense().bool())
