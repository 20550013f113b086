"""Claims of the parallel schemes: those that take a second run here, the trained and the timed ones are slow."""

from __future__ import annotations

import pytest

from manyheads.reproduce import lasp2, ring_self_attention, token_ring
from manyheads.reproduce.claims import Verdict

CLAIMS = {f"{c.system}-{c.name}": c for c in (*ring_self_attention.CLAIMS, *token_ring.CLAIMS, *lasp2.CLAIMS)}
QUICK = (
    "ring_self_attention-volume_of_tensor_parallel",
    "ring_self_attention-zigzag_balances",
    "token_ring-faster_on_slow_links",
    "lasp2-one_collective",
)


@pytest.mark.parametrize("name", QUICK)
def test_counted_claims_are_confirmed(name):
    assert CLAIMS[name].run(0).verdict == Verdict.CONFIRMED


def test_grouped_heads_refute_the_halved_volume():
    finding = CLAIMS["token_ring-half_the_volume_grouped"].run(0)
    assert finding.verdict == Verdict.REFUTED
    assert finding.measured == pytest.approx(2 * 17 / 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in QUICK])
def test_claims_give_a_verdict(name):
    finding = CLAIMS[name].run(0)
    assert finding.verdict in set(Verdict)
    assert finding.measured is not None
