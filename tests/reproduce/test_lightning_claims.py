"""Claims of lightning attention: the exact ones run here, the timed and the trained ones are slow."""

from __future__ import annotations

import pytest

from manyheads.reproduce import lightning_attention, lightning_attention_2
from manyheads.reproduce.claims import Verdict

CLAIMS = {f"{c.system}-{c.name}": c for c in (*lightning_attention.CLAIMS, *lightning_attention_2.CLAIMS)}
CHEAP = ("lightning_attention-exact", "lightning_attention_2-exact_for_any_block")


@pytest.mark.parametrize("name", CHEAP)
def test_exact_claims_are_confirmed(name):
    assert CLAIMS[name].run(0).verdict == Verdict.CONFIRMED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in CHEAP])
def test_claims_give_a_verdict(name):
    finding = CLAIMS[name].run(0)
    assert finding.verdict in set(Verdict)
    assert finding.measured is not None
