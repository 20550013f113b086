"""Claims of InLine attention: the quick ones run, the timed and trained ones are judged on given figures."""

from __future__ import annotations

import pytest
import torch

from manyheads.reproduce import inline_attention as claims
from manyheads.reproduce.claims import Verdict


def test_distinct_queries_stay_distinct() -> None:
    finding = claims.distinct_queries_stay_distinct(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.baseline["linear"] < 1e-6 < finding.measured


def test_other_sizes_refute(monkeypatch) -> None:
    monkeypatch.setattr(claims, "create_model", lambda name: torch.nn.Linear(5000, 2000))
    assert claims.published_sizes(0).verdict is Verdict.REFUTED


@pytest.mark.parametrize("kind", claims.KINDS)
def test_equal_queries_collide_and_others_do_not(kind) -> None:
    net, images = claims.TinyViT(kind, local=True).eval(), torch.rand(2, 3, 8, 8)
    net.positions.data *= 50
    few = claims.collisions(net, images)
    net.positions.data.zero_()
    assert few < 0.2
    assert claims.collisions(net, images[:, :, :1, :1].expand(-1, -1, 8, 8)) > few


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ((0.001, 0.2, 0.002), Verdict.CONFIRMED),
        ((0.0, 0.02, 0.01), Verdict.INCONCLUSIVE),
        ((0.0, 0.01, 0.02), Verdict.REFUTED),
    ],
)
def test_collisions_are_judged_by_the_rule(monkeypatch, shares, verdict) -> None:
    found = iter(shares)
    monkeypatch.setattr(claims, "train_on_digits", lambda build, seed, **options: (build(), torch.zeros(1), None))
    monkeypatch.setattr(claims, "collisions", lambda net, images: next(found))
    assert claims.trained_queries_collide(0).verdict is verdict


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.4, Verdict.CONFIRMED), (0.2, Verdict.INCONCLUSIVE), (-0.1, Verdict.REFUTED)]
)
def test_locality_is_judged_by_the_rule(monkeypatch, gain, verdict) -> None:
    accuracies = iter([0.5, 0.5 + gain] * 3)
    monkeypatch.setattr(claims, "accuracy_on_digits", lambda build, seed, **options: next(accuracies))
    assert claims.locality_helps(0).verdict is verdict


@pytest.mark.parametrize(
    ("power", "verdict"), [(1, Verdict.CONFIRMED), (1.4, Verdict.INCONCLUSIVE), (2, Verdict.REFUTED)]
)
def test_times_are_judged_by_the_rule(monkeypatch, power, verdict) -> None:
    monkeypatch.setattr(claims, "LENGTHS", (8, 16))
    times = iter([1.0, 1.0, 2.0**power, 4.0])
    monkeypatch.setattr(claims, "thread_seconds", lambda run: run() is not None and next(times))
    assert claims.linear_cost(0).verdict is verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained_queries_collide", "locality_helps", "linear_cost"])
def test_claims_give_a_verdict(name) -> None:
    assert getattr(claims, name)(0).verdict in set(Verdict)
