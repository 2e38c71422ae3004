"""Load programs hold exactly the blocks of the lists: the shared ones once in front, then each tile's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_compile.kernels import config
from bsa_compile.kernels.share import share_lists, share_transposed
from bsa_compile.kernels.transpose import transpose_selection

H_SHIFT, T_SHIFT = 10, 21


def unpack(entry: int) -> tuple[tuple[int, int, int], bool]:
    """((t, h, w), whether the block's tile sticks out of the grid)."""
    return ((entry >> T_SHIFT) & 1023, (entry >> H_SHIFT) & 2047, entry & 1023), entry < 0


def blocks_of(tile: int, grid, shape, block: int) -> list[tuple[tuple[int, int, int], bool]]:
    """What the entries of one key tile unpack to."""
    tiles = config.tile_counts(grid, shape)
    t, h, w = tile // (tiles[1] * tiles[2]), tile // tiles[2] % tiles[1], tile % tiles[2]
    origin = [index * side for index, side in zip((t, h, w), shape, strict=True)]
    partial = any(at + side > size for at, side, size in zip(origin, shape, grid, strict=True))
    found = []
    for start in range(0, math.prod(shape), block):
        inside = (start // (shape[1] * shape[2]), start // shape[2] % shape[1], start % shape[2])
        found.append((tuple(a + b for a, b in zip(origin, inside, strict=True)), partial))
    return found


def draw_lists(tiles_q: int, tiles_k: int, heads: int, seed: int, density: float):
    """Random ascending lists of random lengths, the entries beyond them poisoned."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(1, heads, tiles_q, tiles_k, generator=generator) < density
    counts = chosen.sum(-1).int()
    lists = torch.full((1, heads, tiles_q, tiles_k), 2**31 - 1, dtype=torch.int32)
    for row, marks in zip(lists.view(-1, tiles_k), chosen.view(-1, tiles_k), strict=True):
        indices = marks.nonzero().flatten().int()
        row[: len(indices)] = indices
    return counts, lists


@settings(deadline=None, max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    tile=st.sampled_from([(2, 2, 2), (1, 4, 4), (2, 2, 6)]),
    rows=st.sampled_from([1, 2]),
    step=st.sampled_from([1, 2]),
    tiles_q=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
def test_programs_hold_the_lists(grid, tile, rows, step, tiles_q, density, seed, device):
    block = 8
    tiles_k = config.num_tiles(grid, tile)
    counts, lists = draw_lists(tiles_q, tiles_k, 1, seed, density)
    programs, plans = (x.cpu() for x in share_lists(counts.to(device), lists.to(device), grid, tile, block, rows, step))
    groups = -(-tiles_q // rows)
    split = math.prod(tile) // block
    for group in range(groups):
        common, alone_a, alone_b, odd = plans[group].tolist()
        first = group * rows
        members = [first + row for row in range(rows) if first + row < tiles_q]
        wanted = [
            [b for t in lists[0, 0, row, : counts[0, 0, row]].tolist() for b in blocks_of(t, grid, tile, block)]
            for row in members
        ]
        if rows == 1:
            entries = programs[group, 0, : step * common].tolist()
            assert odd == (3 if len(wanted[0]) % step else 0)
            assert [unpack(e) for e in entries][: len(wanted[0])] == wanted[0]
            assert len(entries) == len(wanted[0]) + len(wanted[0]) % step
            continue
        shared = step * common
        both = set(wanted[0]) & set(wanted[-1]) if len(members) == 2 else set()
        # Where steps take two blocks and tiles hold an odd number, an odd shared tile is loaded by each.
        assert len(both) - shared in ((0, split) if split % step else (0,))
        heads_of_programs = [programs[group, side, :shared].tolist() for side in range(len(members))]
        assert all(head == heads_of_programs[0] for head in heads_of_programs)
        for side, blocks in enumerate(wanted):
            alone = (alone_a, alone_b)[side]
            entries = [unpack(e) for e in programs[group, side, : shared + step * alone].tolist()]
            assert sorted(entries[: len(blocks)]) == sorted(blocks)
            assert (odd >> side) & 1 == len(blocks) % step
            if len(blocks) % step:
                assert len(entries) == len(blocks) + 1
                assert entries[-1] in blocks
            else:
                assert len(entries) == len(blocks)


@settings(deadline=None, max_examples=30)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    tile=st.sampled_from([(2, 2, 2), (1, 4, 4), (2, 2, 6)]),
    rows=st.sampled_from([1, 2]),
    tiles_k=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
def test_transposed_programs_hold_the_lists(grid, tile, rows, tiles_k, density, seed, device):
    block, heads = 8, 2
    tiles_q = config.num_tiles(grid, tile)
    counts, lists = draw_lists(tiles_q, tiles_k, heads, seed, density)
    offsets, indices = transpose_selection(counts.to(device), lists.to(device), tiles_k)
    programs, plans = (x.cpu() for x in share_transposed(offsets, indices, grid, tile, block, rows))
    groups, split = -(-tiles_k // rows), math.prod(tile) // block
    assert plans.shape == (heads * groups, 4)
    for head in range(heads):
        for group in range(groups):
            common, *alone, odd = plans[head * groups + group].tolist()
            assert odd == 0
            members = [tile_k for tile_k in range(group * rows, (group + 1) * rows) if tile_k < tiles_k]
            wanted, entries = [], []
            for tile_k in members:
                chosen = [q for q in range(tiles_q) if tile_k in lists[0, head, q, : counts[0, head, q]]]
                wanted.append([b for q in chosen for b in blocks_of(q, grid, tile, block)])
                begin = int(offsets[0, head, tile_k]) * split
                entries.append([unpack(e) for e in programs[0, head, begin : begin + len(wanted[-1])].tolist()])
                assert sorted(entries[-1]) == sorted(wanted[-1])
            if rows == 1:
                assert [common, *alone] == [len(wanted[0]), 0, 0]
                assert entries[0] == wanted[0]
                continue
            shared = set(wanted[0]) & set(wanted[1]) if len(members) == 2 else set()
            assert common == len(shared)
            assert all(set(mine[:common]) == shared and mine[:common] == entries[0][:common] for mine in entries)
            assert alone == [len(mine) - common for mine in wanted] + [0] * (2 - len(members))


def test_an_absent_second_tile_has_no_steps(device):
    counts, lists = torch.tensor([[[2]]], dtype=torch.int32), torch.tensor([[[[0, 2]]]], dtype=torch.int32)
    _, plans = share_lists(counts.to(device), lists.to(device), (3, 4, 4), (1, 4, 4), 16, 2)
    assert plans.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("count", [0, 1101])
def test_lists_longer_than_one_pass_of_the_kernel(count, device):
    grid, tile = (2, 31, 18), (1, 1, 1)
    tiles = math.prod(grid)
    lists = torch.stack([torch.arange(tiles), torch.arange(tiles).roll(-999)]).int()
    lists[1, :count] = lists[1, :count].sort().values
    counts = torch.tensor([[[tiles, count]]], dtype=torch.int32)
    programs, plans = share_lists(counts.to(device), lists[None, None].to(device), grid, tile, 1, 2)
    common = count // 2 * 2
    assert plans.tolist()[0] == [common // 2, (tiles - common + 1) // 2, (count - common + 1) // 2, (count % 2) << 1]
    everything = [unpack(e)[0] for e in programs[0, 0, :tiles].tolist()]
    assert sorted(everything) == [blocks_of(t, grid, tile, 1)[0][0] for t in range(tiles)]
