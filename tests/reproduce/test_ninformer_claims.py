"""NiNformer's claims: the quick ones run, the rules of the others on made-up results."""

from __future__ import annotations

import pytest

from manyheads.bench.speed import Timing
from manyheads.reproduce import ninformer
from manyheads.reproduce.claims import Verdict


def test_cost_is_linear_in_tokens() -> None:
    finding = ninformer.linear_in_tokens(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.measured == 0
    growing = finding.details["per_token_hidden_as_tokens"]
    assert growing[1024] > growing[16]


def test_a_size_alone_does_not_confirm_accuracies() -> None:
    assert ninformer.published_size(0).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("gated", "mlp", "attention", "local", "verdict"),
    [
        (0.9, 0.9, 0.8, 0.8, Verdict.CONFIRMED),
        (0.9, 0.8, 0.9, 0.8, Verdict.INCONCLUSIVE),
        (0.9, 0.8, 0.8, 0.95, Verdict.INCONCLUSIVE),
        (0.895, 0.9, 0.8, 0.8, Verdict.REFUTED),
        (0.8, 0.9, 0.7, 0.7, Verdict.REFUTED),
    ],
)
def test_accuracies_are_judged_by_the_rule(monkeypatch, gated, mlp, attention, local, verdict) -> None:
    means = {"gated": gated, "mlp": mlp, "attention": attention, "local": local}
    monkeypatch.setattr(ninformer, "_accuracy", lambda mixer, seed: means[mixer] + 0.01 * (seed % 3 - 1))
    assert ninformer.the_gate_helps(0).verdict is verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(1.2, "confirmed"), (1.6, "inconclusive"), (2.1, "refuted")])
def test_times_are_judged_by_the_rule(monkeypatch: pytest.MonkeyPatch, ratio: float, verdict: str) -> None:
    times = dict.fromkeys(("mlp", "attention", "local"), Timing(1.0, 0)) | {"gated": Timing(ratio, 0)}
    monkeypatch.setattr(ninformer, "measure", lambda *args, **options: times)
    assert ninformer.little_slower_than_a_mixer(0).verdict.value == verdict
