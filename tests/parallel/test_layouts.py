"""Layouts: every token on exactly one rank, and back again; tiles cover exactly the pairs that attend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.parallel import position_ids, shard, token_index, unshard
from manyheads.parallel.blocks import Tile, tiles
from manyheads.parallel.layouts import LAYOUTS, runs

QUICK = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def layouts(draw):
    world, layout = draw(st.integers(1, 5)), draw(st.sampled_from(LAYOUTS))
    multiple = 2 * world if layout == "zigzag" else world
    per_sequence = draw(st.booleans())
    if per_sequence:
        lengths = [multiple * n for n in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))]
    else:
        total = multiple * draw(st.integers(0, 6))
        cuts = sorted(draw(st.lists(st.integers(0, total), max_size=4)))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, total])]
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    return world, layout, cu, per_sequence


@QUICK
@given(layouts())
def test_every_token_is_on_one_rank_and_finds_back(case):
    world, layout, cu, per_sequence = case
    options = dict(layout=layout, cu_seqlens=cu, per_sequence=per_sequence)
    index = token_index(cu[-1], world, **options)
    assert index.shape == (world, cu[-1] // world)
    assert sorted(index.flatten().tolist()) == list(range(cu[-1]))
    whole = torch.randn(2, cu[-1], 3)
    parts = [shard(whole, rank, world, dim=1, **options) for rank in range(world)]
    assert torch.equal(unshard(parts, dim=1, **options), whole)
    starts = torch.tensor(cu)
    for rank in range(world):
        positions = position_ids(cu[-1], rank, world, **options)
        sequence = torch.searchsorted(starts, index[rank], right=True) - 1
        assert torch.equal(positions, index[rank] - starts[sequence])


@QUICK
@given(layouts(), st.booleans())
def test_tiles_cover_exactly_the_pairs_that_attend(case, causal):
    world, layout, cu, per_sequence = case
    index = token_index(cu[-1], world, layout=layout, cu_seqlens=cu, per_sequence=per_sequence)
    starts = torch.tensor(cu)
    for owner in range(world):
        for holder in range(world):
            pieces = [runs(cu[-1], world, rank, layout, cu, per_sequence) for rank in (owner, holder)]
            found = tiles(*pieces, causal)
            seen = torch.zeros(index.shape[1], index.shape[1], dtype=torch.int64)
            for tile in found:
                rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
                block = torch.ones(rows, columns, dtype=torch.int64)
                block = block.tril(columns - rows) if tile.causal else block
                assert block.sum() == tile.pairs
                assert block.any(1).all()
                seen[tile.rows, tile.columns] += block
            i, j = index[owner][:, None], index[holder]
            sequence = [torch.searchsorted(starts, x, right=True) for x in (i, j)]
            want = (sequence[0] == sequence[1]) & ((j <= i) if causal else torch.ones_like(j <= i))
            assert torch.equal(seen, want.long())


def test_zigzag_tiles_are_those_of_the_paper():
    w, n, h = 4, 8, 4

    def of(owner: int, holder: int) -> list[Tile]:
        return tiles(runs(w * n, w, owner, "zigzag"), runs(w * n, w, holder, "zigzag"), True)

    assert of(1, 1) == [Tile(slice(0, n), slice(0, n), True)]
    assert of(2, 1) == [Tile(slice(0, n), slice(0, h), False)]
    assert of(1, 2) == [Tile(slice(h, n), slice(0, n), False)]


@pytest.mark.parametrize(
    ("tokens", "layout", "words"),
    [
        (10, "contiguous", "multiple of 4"),
        (12, "zigzag", "multiple of 8"),
        (6, "striped", "multiple of 4"),
    ],
)
def test_lengths_that_do_not_divide_name_the_multiple(tokens, layout, words):
    with pytest.raises(ValueError, match=words):
        token_index(tokens, 4, layout=layout)


def test_bad_layout_arguments_are_refused():
    with pytest.raises(ValueError, match="'zigzag'"):
        token_index(8, 2, layout="spiral")
    with pytest.raises(ValueError, match="rise from 0"):
        token_index(8, 2, cu_seqlens=[0, 5, 4, 8])
    with pytest.raises(ValueError, match="a sequence of 3 tokens"):
        token_index(8, 2, layout="striped", cu_seqlens=[0, 3, 8], per_sequence=True)
    with pytest.raises(ValueError, match=r"rank must be within 0 \.\. 1"):
        shard(torch.zeros(4), 2, 2, dim=0)
    with pytest.raises(ValueError, match="must divide the 4 ranks"):
        token_index(16, 4, ulysses=3)
    with pytest.raises(ValueError, match="one shape"):
        unshard([torch.zeros(2), torch.zeros(3)], dim=0)
    with pytest.raises(TypeError, match="1-D integer"):
        token_index(8, 2, cu_seqlens=torch.tensor([0.0, 8.0]))
