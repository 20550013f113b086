"""What the recorder counts in the real schemes is what the cost model assumes, byte for byte."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from manyheads.cost.parallel import volume
from manyheads.cost.schedules import Sequence
from manyheads.parallel import lasp, lasp2, lasp2h, record, ring_self_attention, token_ring, ulysses_ring_attention

BATCH, HEADS, WIDTH, TOKENS = 2, 4, 8, 6


@functools.cache
def _group(size: int):
    return dist.new_group(list(range(size)))


@functools.cache
def _alone():
    """This rank by itself. Every rank makes it: torch names groups by how many this process made, also these."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _ulysses(query, key, value, *, group, causal):
    return ulysses_ring_attention(query, key, value, ulysses_group=group, ring_group=_alone(), causal=causal)


CASES = [
    ("ring", ring_self_attention, 2, {"causal": False}),
    ("ring", ring_self_attention, 1, {"causal": True}),
    ("zigzag ring", ring_self_attention, 4, {"causal": True, "layout": "zigzag"}),
    ("token_ring", token_ring, 4, {"causal": False}),
    ("token_ring", token_ring, 2, {"causal": True, "layout": "zigzag"}),
    ("all_gather", lasp2h, 2, {"causal": True}),
    ("zigzag all_gather", lasp2h, 1, {"causal": True, "layout": "zigzag"}),
    ("ulysses", _ulysses, 4, {"causal": True}),
    ("lasp", lasp, 4, {}),
    ("lasp2", lasp2, 4, {}),
]


def _traffic(function, kv_heads: int, dtype: torch.dtype, options: dict, sub: int):
    """(sent, received, messages, collectives) forward and backward of this rank, within a group of ``sub`` ranks."""
    group, _ = _group(sub), _alone()
    if dist.get_rank() >= sub:
        return None
    query = torch.randn(BATCH, HEADS, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(BATCH, kv_heads, TOKENS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    with record() as forward:
        out = function(query, key, value, group=group, **options)
    with record() as backward:
        out.sum().backward()
    return [
        (
            log.sent(),
            log.received(),
            len(log.chosen(kind="send")),
            len([m for m in log.messages if m.kind not in ("send", "receive")]),
        )
        for log in (forward, backward)
    ]


@pytest.mark.parametrize("sub", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "function", "kv_heads", "options"), CASES)
def test_schemes_send_what_the_model_says(four_ranks, method, function, kv_heads, options, dtype, sub):
    sequence = Sequence(
        TOKENS * sub, sub, batch=BATCH, heads=HEADS, kv_heads=kv_heads, head_dim=WIDTH,
        element_bytes=dtype.itemsize, causal=options.get("causal", True),
    )  # fmt: skip
    found = four_ranks.run(_traffic, function, kv_heads, dtype, options, sub)
    for backward in range(2):
        expected = [volume(method, sequence, backward=bool(backward), rank=rank) for rank in range(sub)]
        measured = [found[rank][backward] for rank in range(sub)]
        assert [m[0] for m in measured] == [e.sent for e in expected]
        assert [m[2:] for m in measured] == [(e.messages, e.collectives) for e in expected]
        # Where ranks differ, one receives what another sends.
        assert sum(m[1] for m in measured) == sum(e.received for e in expected)


@pytest.mark.parametrize("method", ["ring", "token_ring", "lasp2"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_busiest_rank_is_every_rank_where_all_are_alike(method, backward):
    sequence = Sequence(480, 5, heads=4, head_dim=8, causal=False)
    assert volume(method, sequence, backward=backward) == volume(method, sequence, backward=backward, rank=3)
