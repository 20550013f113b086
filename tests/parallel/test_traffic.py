"""What every rank sends equals the formulas of the papers, exactly; and the recorder misses nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from manyheads import parallel
from manyheads.parallel import wire
from tests.parallel.rank_cases import linear_case, softmax_case

W, B, H, n, d = 4, 2, 4, 6, 8
SHAPE = dict(batch=B, heads=H, tokens=W * n, width=d)


def softmax_logs(pool, scheme, **options):
    return [result["log"] for result in pool.run(_softmax, scheme, SHAPE | options)]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ring(four_ranks, kv_heads, layout):
    options = dict(causal=True, layout=layout) if layout == "zigzag" else {}
    for log in softmax_logs(four_ranks, "ring_self_attention", kv_heads=kv_heads, tokens=32, **options):
        numbers = B * kv_heads * 8 * d
        assert log.sent(call="ring_self_attention") == 2 * (W - 1) * numbers * 4
        assert log.sent(call="ring_self_attention backward", what="key, value") == 2 * (W - 1) * numbers * 4
        assert log.sent(what="gradient of key, value") == 2 * W * numbers * 4
        assert {m.distance for m in log.chosen(kind="send")} == {1}
        assert log.received() == log.sent()
        assert len(log.chosen(call="ring_self_attention", kind="send")) == W - 1


def test_half_precision_travels_in_half_precision(four_ranks):
    numbers = B * 2 * n * d
    for log in softmax_logs(four_ranks, "ring_self_attention", kv_heads=2, dtype="bfloat16"):
        assert log.sent(call="ring_self_attention") == 2 * (W - 1) * numbers * 2
        assert log.sent(what="gradient of key, value") == 2 * W * numbers * 4


def test_token_ring_without_mask(four_ranks):
    for log in softmax_logs(four_ranks, "token_ring", kv_heads=1):
        assert log.sent(what="query") == (W - 1) * B * H * n * d * 4
        assert log.sent(what="output") == (W - 1) * B * H * n * (d + 1) * 4
        assert log.sent(what="query, gradient") == (W - 1) * B * H * n * (2 * d + 2) * 4
        assert log.sent(what="gradient of query") == (W - 1) * B * H * n * d * 4
        assert {m.distance for m in log.chosen(kind="send", what="query")} == {1}
        assert sorted(m.distance for m in log.chosen(kind="send", what="output")) == [1, 2, 3]
        # Queries and outputs leave in the same step: both directions are busy at once.
        both = {m.step for m in log.chosen(kind="send", what="query")} & {
            m.step for m in log.chosen(kind="send", what="output")
        }
        assert both == {2}


def test_token_ring_causal_zigzag_halves(four_ranks):
    logs = softmax_logs(four_ranks, "token_ring", tokens=32, causal=True, layout="zigzag")
    whole, half = B * H * 8 * 4, B * H * 4 * 4
    sent = [log.sent(what="query") for log in logs]
    # Over all ranks W (W - 1) / 2 whole messages and as many halves.
    assert sum(sent) == W * (W - 1) // 2 * (whole + half) * d
    assert sum(log.sent(what="output") for log in logs) == W * (W - 1) // 2 * (whole + half) * (d + 1)
    assert {m.distance for log in logs for m in log.chosen(kind="send", what="query")} == {W - 1}


@pytest.mark.parametrize("scheme", ["ring_self_attention", "token_ring"])
def test_zigzag_balances_the_work(four_ranks, scheme):
    logs = softmax_logs(four_ranks, scheme, tokens=32, causal=True, layout="zigzag")
    # 2 (n/2)^2 pairs a step, and the triangle of the own tokens at step 0.
    assert [log.pairs for log in logs] == [{(scheme, 0): 36, (scheme, 1): 32, (scheme, 2): 32, (scheme, 3): 32}] * W


def test_contiguous_causal_work_grows_with_the_rank(four_ranks):
    logs = softmax_logs(four_ranks, "ring_self_attention", causal=True)
    assert [sum(log.pairs.values()) for log in logs] == [21 + 36 * rank for rank in range(W)]


@pytest.mark.parametrize("tokens", [24, 96])
@pytest.mark.parametrize("gates", ["none", "constant"])
def test_lasp2_makes_one_all_gather_each_way_whatever_the_length(four_ranks, tokens, gates):
    for result in four_ranks.run(_linear, "lasp2", dict(tokens=tokens, gates=gates)):
        found = [(m.call, m.kind, m.sent, m.received) for m in result["log"].messages]
        size = 2 * 2 * 5 * 6 * 4
        assert found == [
            ("lasp2", "all_gather", size, (W - 1) * size),
            ("lasp2 backward", "all_gather", size, (W - 1) * size),
        ]


def test_gates_add_the_ranks_total_decay(four_ranks):
    for result in four_ranks.run(_linear, "lasp2", dict(gates="channel")):
        assert result["log"].sent(call="lasp2") == 2 * 2 * (5 * 6 + 5) * 4


def test_lasp_passes_the_state_from_rank_to_rank(four_ranks):
    logs = [result["log"] for result in four_ranks.run(_linear, "lasp", {})]
    size = 2 * 2 * 5 * 6 * 4
    forward = [log.sent(call="lasp") for log in logs]
    backward = [log.sent(call="lasp backward") for log in logs]
    assert forward == [size, size, size, 0]
    assert backward == [0, size, size, size]
    assert sum(len(log.chosen(kind="send")) for log in logs) == 2 * (W - 1)


def test_lasp2h_gathers_and_scatters(four_ranks):
    for log in softmax_logs(four_ranks, "lasp2h", causal=True, kv_heads=2):
        numbers = 2 * B * 2 * n * d * 4
        assert [(m.kind, m.received) for m in log.messages] == [
            ("all_gather", (W - 1) * numbers),
            ("reduce_scatter", (W - 1) * numbers),
        ]


@pytest.mark.parametrize(("reduction", "total"), [("all_reduce", 8), ("reduce_scatter", 6)])
def test_the_papers_own_rings(four_ranks, reduction, total):
    for log in four_ranks.run(_rsa, reduction):
        assert log.sent() == total * (W - 1) * B * H * n * d * 4


def test_linformer_sends_the_same_for_any_length(four_ranks):
    sent = [{log.sent() for log in four_ranks.run(_linformer, tokens)} for tokens in (6, 24)]
    assert sent[0] == sent[1] == {2 * 2 * (W - 1) * (2 * B * H * 5 * d) * 4 // W}


def test_the_recorder_sees_every_call_of_torch_distributed(four_ranks):
    for counted, recorded in four_ranks.run(_spied):
        assert counted == recorded
        assert counted > 0


def _softmax(scheme, options):
    return softmax_case(scheme, **options)


def _linear(scheme, options):
    return linear_case(scheme, **options)


def _rsa(reduction):
    tensors = [torch.randn(B, H, n, d, requires_grad=True) for _ in range(3)]
    with parallel.record() as log:
        parallel.rsa_attention(*tensors, reduction=reduction, timeout=20).sum().backward()
    return log


def _linformer(tokens):
    tensors = [torch.randn(B, H, tokens, d, requires_grad=True) for _ in range(3)]
    projections = [torch.randn(5, tokens) for _ in range(2)]
    with parallel.record() as log:
        parallel.rsa_linformer(*tensors, *projections, timeout=20).sum().backward()
    return log


def _spied():
    counted, batch = [], dist.batch_isend_irecv

    def spy(ops):
        counted.extend(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return batch(ops)

    wire.dist.batch_isend_irecv = spy
    try:
        tensors = [torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3)]
        with parallel.record() as log:
            for scheme in (parallel.ring_self_attention, parallel.token_ring):
                scheme(*tensors, causal=True, layout="zigzag", timeout=20).sum().backward()
    finally:
        wire.dist.batch_isend_irecv = batch
    return sum(counted), log.sent()
