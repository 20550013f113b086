"""What goes wrong is an error on every rank, in time, with the name of the rank that is to blame."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch
import torch.distributed as dist

from manyheads import parallel
from manyheads.parallel import LocalRanks, RankError

SCHEMES = ("ring_self_attention", "token_ring", "lasp2h", "lasp2")
DIFFERENT = {
    "layout": "disagree on layout",
    "causal": "disagree on causal|refused its arguments",
    "shape": "disagree on .*query",
    "dtype": "disagree on .*(dtype|query)",
    "scale": "disagree on scale",
    "length": "refused its arguments|needs as many keys",
    "call": "disagree on call",
    "gradient": "disagree on whether gradients",
}


def tensors(tokens=8, dtype=torch.float32, heads=2):
    return [torch.ones(1, heads, tokens, 4, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_arguments_are_an_error_on_all_ranks_before_data_moves(four_ranks, what):
    for problem, sent in four_ranks.run(_differ, what):
        assert isinstance(problem, ValueError), problem
        assert re.search(DIFFERENT[what], str(problem)), problem
        assert sent == 0


def test_the_group_still_works_after_a_refusal(four_ranks):
    assert four_ranks.run(_refuse_then_work) == [1.0] * 4


def test_the_wrong_group_is_an_error(four_ranks):
    problems = four_ranks.run(_wrong_group)
    assert all(isinstance(problem, ValueError) for problem in problems[:2]), problems
    assert all("group does not agree" in str(problem) for problem in problems[:2])
    assert isinstance(problems[2], ValueError | RankError)


def test_not_being_in_the_group_is_an_error(four_ranks):
    found = four_ranks.run(_outside)
    assert found[0] == found[1] == "fine"
    assert "that this rank belongs to" in found[2]


def test_decays_must_agree(four_ranks):
    for problem in four_ranks.run(_decays):
        assert "disagree on log_decay" in str(problem)


LOST = [("ring_self_attention", "dies later"), ("token_ring", "stalls"), ("lasp2", "dies")]
MORE = [(scheme, how) for scheme in SCHEMES for how in ("dies", "stalls", "fails")]


@pytest.mark.parametrize(
    ("scheme", "how"), LOST + [pytest.param(*one, marks=pytest.mark.slow) for one in MORE if one not in LOST]
)
def test_every_other_rank_names_the_one_that_is_gone(scheme, how):
    started = time.monotonic()
    with LocalRanks(4, timeout=60) as pool:
        found = pool.attempt(_lose, scheme, how, 2)
    assert time.monotonic() - started < 50
    for rank in (0, 1, 3):
        problem = found[rank]
        assert isinstance(problem, RankError), (rank, problem)
        assert problem.ranks == (2,), (rank, str(problem))
        assert "rank 2" in str(problem)
        assert "unusable" in str(problem)


def test_a_rank_that_never_comes_is_named(four_ranks):
    found = four_ranks.run(_absent)
    for problem in found[:3]:
        assert isinstance(problem, RankError)
        assert problem.ranks == (3,)
        assert "did not come to this call within 1 s" in str(problem)


def test_bad_arguments_of_one_rank(one_rank):
    q, k, v = tensors()
    ring = parallel.ring_self_attention
    with pytest.raises(ValueError, match="take 'contiguous'"):
        ring(q, k, v, layout="zigzag")
    with pytest.raises(ValueError, match="pad to a multiple of 2"):
        ring(*tensors(7), causal=True, layout="zigzag")
    with pytest.raises(ValueError, match="'spiral' is not one of"):
        ring(q, k, v, causal=True, layout="spiral")
    with pytest.raises(ValueError, match="as many keys as queries"):
        ring(q, k[:, :, :4], v[:, :, :4], causal=True)
    with pytest.raises(ValueError, match="must divide query heads"):
        ring(*tensors(heads=3)[:1], *tensors()[:2])
    with pytest.raises(TypeError):  # in the tests the shape annotations refuse it first
        ring(q.long(), k, v)
    with pytest.raises(ValueError, match="key_mask must be boolean over the whole sequence"):
        ring(q, k, v, key_mask=torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="rise from 0 to the 8 tokens"):
        ring(q, k, v, cu_seqlens=[0, 9])
    with pytest.raises(ValueError, match="without cu_seqlens"):
        ring(q, k, v, cu_seqlens_key=[0, 8])
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        ring(q, k, v, per_sequence=True)
    with pytest.raises(ValueError, match="timeout must be a positive"):
        ring(q, k, v, timeout=0)
    with pytest.raises(ValueError, match="scale must be finite"):
        ring(q, k, v, scale=float("inf"))
    with pytest.raises(ValueError, match="belongs to"):
        ring(q, k, v, group="world")
    with pytest.raises(TypeError, match="unexpected keyword"):
        ring(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="needs causal=True"):
        parallel.lasp2(q, k, v, causal=False, log_decay=-torch.ones(2))
    with pytest.raises(ValueError, match="neither initial_state nor return_state"):
        parallel.lasp2(q, k, v, cu_seqlens=[0, 8], return_state=True)
    with pytest.raises(ValueError, match="'sum' is not one of"):
        parallel.rsa_attention(q, k, v, reduction="sum")
    with pytest.raises(ValueError, match="key_projection must be"):
        parallel.rsa_linformer(q, k, v, torch.ones(3, 7), torch.ones(3, 7))


def test_no_process_group_is_an_error():
    with pytest.raises(ValueError, match="torchrun"):
        parallel.ring_self_attention(*tensors())


def test_a_mesh_of_two_dimensions_is_refused(four_ranks):
    for name, error in four_ranks.run(_mesh):
        assert name == "fine"
        assert "mesh['cp']" in error


def test_errors_of_the_functions_of_local_ranks_are_told():
    with pytest.raises(ValueError, match="at least 1"):
        LocalRanks(0)
    with LocalRanks(2, timeout=30) as pool:
        with pytest.raises(RuntimeError, match="rank 1: ZeroDivisionError"):
            pool.run(_divide)
        pool.timeout = 1.0
        with pytest.raises(RuntimeError, match=r"1 of 2 ranks failed\nrank 0: TimeoutError"):
            pool.run(_sleep)


def _problem(function, *args, **options):
    with parallel.record() as log:
        try:
            function(*args, **options)
        except (ValueError, TypeError, RankError) as problem:
            return problem, log.sent()
    return None, log.sent()


def _differ(what):
    odd = dist.get_rank() == 2
    ring, options, given = parallel.ring_self_attention, dict(causal=True, layout="zigzag", timeout=10), tensors()
    if what == "layout" and odd:
        options["layout"] = "striped"
    if what == "causal" and odd:
        options |= dict(causal=False, layout="contiguous")
    if what == "shape" and odd:
        given = tensors(16)
    if what == "dtype" and odd:
        given = tensors(dtype=torch.bfloat16)
    if what == "scale" and odd:
        options["scale"] = 0.3
    if what == "length" and odd:
        given = [given[0], *(t[:, :, :4] for t in given[1:])]
    if what == "call" and odd:
        ring = parallel.token_ring
    if what == "gradient" and odd:
        given[1].requires_grad_()
    return _problem(ring, *given, **options)


def _refuse_then_work():
    rank, options = dist.get_rank(), dict(causal=True, layout="zigzag", timeout=10)
    for _ in range(2):
        problem, _sent = _problem(parallel.ring_self_attention, *tensors(7 if rank == 1 else 8), **options)
        assert isinstance(problem, ValueError)
    return float(parallel.ring_self_attention(*tensors(), **options).mean())


def _wrong_group():
    pair, rank = dist.new_group([0, 1]), dist.get_rank()
    group = pair if rank == 0 else None
    problem, sent = _problem(parallel.ring_self_attention, *tensors(), group=group, timeout=3)
    assert sent == 0
    return problem


def _outside():
    pair, rank = dist.new_group([0, 1]), dist.get_rank()
    problem, _ = _problem(parallel.ring_self_attention, *tensors(), group=pair, timeout=10)
    return "fine" if problem is None and rank < 2 else str(problem)


def _decays():
    decay = -torch.ones(2) * (1 + (dist.get_rank() == 1))
    return _problem(parallel.lasp2, *tensors(), log_decay=decay, timeout=10)[0]


def _absent():
    dist.barrier()
    if dist.get_rank() == 3:
        time.sleep(2)
        return None
    return _problem(parallel.ring_self_attention, *tensors(), timeout=1)[0]


def _mesh():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    fine, _ = _problem(parallel.ring_self_attention, *tensors(), group=mesh["cp"], timeout=10)
    problem, _ = _problem(parallel.ring_self_attention, *tensors(), group=mesh, timeout=10)
    return "fine" if fine is None else str(fine), str(problem)


def _lose(scheme, how, victim):
    """One call that works, then one in the middle of which a rank is lost."""
    given = [t.requires_grad_() for t in tensors()]
    getattr(parallel, scheme)(*given, timeout=60).sum().backward()
    dist.barrier()
    if dist.get_rank() == victim:
        from manyheads.parallel import wire

        post, calls = wire.Wire._record, []

        def lost(self, what, *rest):
            calls.append(what)
            if len(calls) > (2 if how == "dies later" else 0):
                if how.startswith("dies"):
                    os._exit(3)
                if how == "stalls":
                    time.sleep(6)
                raise MemoryError("no room for the buffer")
            post(self, what, *rest)

        wire.Wire._record = lost
    getattr(parallel, scheme)(*given, timeout=2).sum().backward()


def _divide():
    return 1 / (1 - dist.get_rank())


def _sleep():
    time.sleep(3 * (1 - dist.get_rank()))
