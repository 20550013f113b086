from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from typer.testing import CliRunner

from manyheads.cli.main import app
from manyheads.cost.parallel import LINKS, METHODS, SOFTMAX, Mesh, Prediction, compare, predict, volume, winner
from manyheads.cost.schedules import Sequence

# Links so slow that only bytes count, and so fast that only operations count.
SLOW = Mesh(rate=1e30, bandwidth=1e6, latency=0, links="mesh")
FAST = Mesh(rate=1e9, bandwidth=1e30, latency=0)


def _sequence(length=4096, world=8, **sizes) -> Sequence:
    return Sequence(length, world, **{"heads": 8, "head_dim": 64, "causal": False, **sizes})


@pytest.mark.parametrize("world", [2, 3, 8])
def test_volumes_are_the_sheets_formulas(world):
    s = _sequence(96 * world, world, batch=2, kv_heads=2)
    n, b, e, d, h, g = s.tokens, 2, 2, 64, 8, 2
    assert volume("ring", s).sent == 2 * (world - 1) * b * g * n * d * e
    assert volume("ring", s, backward=True).sent == 2 * (world - 1) * b * g * n * d * e + 2 * world * b * g * n * d * 4
    assert volume("token_ring", s).sent == (world - 1) * b * h * n * (2 * d * e + 4)
    assert volume("token_ring", s, backward=True).sent == (world - 1) * b * h * n * (2 * d * e + 8 + d * 4)
    assert volume("lasp2", s).received == (world - 1) * b * h * d * d * 4
    assert volume("lasp2", s).sent == b * h * d * d * 4
    assert volume("all_gather", s).received == (world - 1) * 2 * b * g * n * d * e


@pytest.mark.parametrize("world", [2, 4, 7])
def test_causal_token_ring_sends_three_quarters(world):
    causal = _sequence(20 * world, world, causal=True, element_bytes=4)
    ranks = [volume("token_ring", causal, rank=rank).sent for rank in range(world)]
    assert sum(ranks) * 4 == 3 * world * volume("token_ring", dataclasses.replace(causal, causal=False)).sent


def test_one_rank_sends_nothing():
    alone = _sequence(world=1, causal=True)
    for method, backward in itertools.product(METHODS[:-1], (False, True)):
        found = volume(method, alone, backward=backward)
        assert (found.sent, found.received, found.messages, found.collectives) == (0, 0, 0, 0)


def test_every_scheme_has_the_operations_of_one_device():
    whole = predict("ring", _sequence(world=1), FAST).compute
    for method in ("ring", "token_ring", "all_gather", "ulysses"):
        assert predict(method, _sequence(world=8), FAST).compute * 8 == pytest.approx(whole)
    causal = predict("ring", _sequence(world=1, causal=True), FAST).compute
    for method in ("zigzag ring", "token_ring", "ulysses"):
        assert predict(method, _sequence(world=8, causal=True), FAST).compute * 8 == pytest.approx(causal, rel=1e-3)


@pytest.mark.parametrize("world", [2, 4, 64])
def test_claim_zigzag_balances(world):
    causal = _sequence(4096 * world, world, causal=True)
    contiguous, zigzag = (predict(name, causal, FAST).total for name in ("ring", "zigzag ring"))
    assert contiguous / zigzag == pytest.approx(2 - 1 / world, rel=1e-3)


def test_claim_token_ring_uses_both_directions():
    for world, length in itertools.product((4, 16, 64), (2**14, 2**18)):
        equal = _sequence(length, world, head_dim=128)
        forward = [predict(name, equal, SLOW).forward for name in ("ring", "token_ring")]
        # The sheet's bound is 2; outputs follow two steps behind their queries, and travel alone at the end.
        assert forward[0] / forward[1] == pytest.approx(2 * (world - 1) / (world + 1), rel=0.02)
        # With few key/value heads queries and outputs are more than keys and values: the claim turns round.
        grouped = dataclasses.replace(equal, kv_heads=2)
        assert predict("token_ring", grouped, SLOW).total > predict("ring", grouped, SLOW).total


def test_token_ring_needs_two_directions():
    equal = _sequence(2**16, 16, head_dim=128)
    for mesh in (dataclasses.replace(SLOW, duplex=False), dataclasses.replace(SLOW, links="switch")):
        assert predict("token_ring", equal, mesh).forward > 0.99 * predict("ring", equal, mesh).forward
    on_ring = dataclasses.replace(SLOW, links="ring")
    assert predict("token_ring", equal, on_ring).forward > predict("ring", equal, on_ring).forward


def test_claim_lasp2_does_not_grow_with_the_length():
    short, long = (_sequence(length, 64) for length in (2**12, 2**21))
    assert volume("lasp2", short) == volume("lasp2", long)
    assert volume("ring", long).sent == 512 * volume("ring", short).sent


def test_claim_lasp2_beats_lasp_and_ring():
    mesh = Mesh(latency=5e-3)
    for world in (4, 64, 4096):
        s = _sequence(4096 * world, world, causal=True)
        lasp2, lasp, ring = (predict(name, s, mesh).total for name in ("lasp2", "lasp", "zigzag ring"))
        assert lasp2 < lasp
        assert lasp2 < ring
    # Two gathers against 2 (W - 1) hops: latency alone.
    waiting = dataclasses.replace(mesh, rate=1e30, bandwidth=1e30, links="mesh")
    lasp2, lasp = (predict(name, _sequence(world=64), waiting).total for name in ("lasp2", "lasp"))
    assert lasp / lasp2 == pytest.approx(63)


def test_lasp2h_is_a_mean_of_its_layers():
    s, mesh = _sequence(causal=True), Mesh()
    hybrid, linear, softmax = (predict(name, s, mesh) for name in ("lasp2h", "lasp2", "all_gather"))
    assert hybrid.total == pytest.approx((3 * linear.total + softmax.total) / 4)


@pytest.mark.parametrize("links", LINKS)
def test_a_step_takes_at_least_what_bounds_it(links):
    mesh = Mesh(rate=3e12, bandwidth=2e9, latency=1e-5, links=links)
    for world in (1, 2, 16, 4096):
        found = compare(_sequence(2**17, world, causal=True), mesh)
        for method, one in found.items():
            if isinstance(one, str):
                assert method == "ulysses"
                continue
            assert one.total * (1 + 1e-12) >= one.compute > 0
            assert one.total == pytest.approx(one.compute + one.exposed)
            faster = predict(method, _sequence(2**17, world, causal=True), dataclasses.replace(mesh, bandwidth=4e9))
            assert faster.total <= one.total * (1 + 1e-12)


def test_the_winner_is_the_fastest():
    s, mesh = _sequence(2**17, 512, causal=True), Mesh()
    times = {name: one.total for name, one in compare(s, mesh, SOFTMAX).items() if isinstance(one, Prediction)}
    assert winner(s, mesh) == min(times, key=times.__getitem__)
    assert winner(s, mesh, ("ulysses",)) is None  # 8 heads, 512 ranks


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sequence(100, 3), "100 tokens do not divide over 3 ranks .the next length is 102"),
        (lambda: Sequence(100, 2, heads=8, kv_heads=3), "multiple of kv_heads"),
        (lambda: Sequence(0, 1), "length must be at least 1"),
        (lambda: Mesh(bandwidth=0), "rate and bandwidth must be positive"),
        (lambda: Mesh(links="torus"), "links must be ring, mesh, switch, got 'torus'"),
        (lambda: volume("rings", _sequence()), "method 'rings' is unknown"),
        (lambda: volume("zigzag ring", _sequence()), "balances causal attention"),
        (lambda: volume("zigzag ring", _sequence(72, causal=True)), "zigzag needs a multiple of 16 tokens"),
        (lambda: volume("ulysses", _sequence(world=16)), "Ulysses needs"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_command_prints_where_each_scheme_wins():
    run = CliRunner().invoke(app, ["compare", "--parallel", "--devices", "16", "--kv-heads", "8"])
    assert run.exit_code == 0, run.output
    assert "zigzag ring" in run.output
    assert "fastest softmax attention" in run.output
    assert "ulysses: Ulysses needs" in run.output
    assert "assumed: 400 T operations/s" in run.output

    run = CliRunner().invoke(app, ["compare", "--parallel", "--devices", "16", "--json", "--pattern", "noncausal-self"])
    found = json.loads(run.output)
    expected = predict("token_ring", Sequence(131072, 16, causal=False), Mesh())
    assert found["methods"]["token_ring"]["total"] == expected.total
    assert found["fastest"]["linear"]["4096"]["2097152"] == "lasp2"
    assert "zigzag ring" not in found["methods"]


def test_command_says_what_it_cannot_do():
    for arguments, words in [
        (["--parallel", "--pattern", "causal-cross"], "compares causal-self or noncausal-self"),
        (["--parallel", "--length", "1001"], "do not divide over 64 ranks"),
        ([], "--pattern is needed"),
    ]:
        problem = CliRunner().invoke(app, ["compare", *arguments]).exception
        assert isinstance(problem, ValueError)
        assert words in str(problem)
