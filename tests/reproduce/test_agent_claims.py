"""Claims of agent attention: the rules are tried on given figures, the timed and trained ones run in the long suite."""

from __future__ import annotations

import pytest
import torch

from manyheads.reproduce import agent_attention as claims
from manyheads.reproduce.claims import Verdict


@pytest.mark.parametrize(
    ("agent", "bare", "verdict"),
    [(0.9, 0.8, Verdict.CONFIRMED), (0.895, 0.91, Verdict.INCONCLUSIVE), (0.85, 0.8, Verdict.REFUTED)],
)
def test_accuracies_are_judged_by_the_rule(monkeypatch, agent, bare, verdict) -> None:
    accuracies = iter([agent] * claims.SEEDS + [bare] * claims.SEEDS + [0.9] * claims.SEEDS)
    monkeypatch.setattr(claims, "accuracy_on_digits", lambda build, seed, **options: next(accuracies))
    assert claims.as_good_as_softmax(0).verdict is verdict


def test_without_its_convolution_the_model_has_none() -> None:
    images = torch.randn(1, 3, 32, 32)
    net = claims.MeanPooled(3, local=False).train()
    net(images).sum().backward()
    silent = [parameter for name, parameter in net.named_parameters() if ".dwc." in name]
    assert len(silent) == 6
    assert all(parameter.grad is None and not parameter.any() for parameter in silent)


@pytest.mark.parametrize(
    ("power", "verdict"), [(1, Verdict.CONFIRMED), (1.4, Verdict.INCONCLUSIVE), (2, Verdict.REFUTED)]
)
def test_times_are_judged_by_the_rule(monkeypatch, power, verdict) -> None:
    monkeypatch.setattr(claims, "LENGTHS", (64, 128))
    times = iter([1.0, 1.0, 2.0**power, 4.0])
    monkeypatch.setattr(claims, "thread_seconds", lambda run: run() is not None and next(times))
    assert claims.linear_cost(0).verdict is verdict


def test_other_sizes_refute(monkeypatch) -> None:
    monkeypatch.setattr(claims, "create_model", lambda name: torch.nn.Linear(5000, 2000))
    assert claims.published_sizes(0).verdict is Verdict.REFUTED


@pytest.mark.slow
@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
def test_claims_give_a_verdict(claim) -> None:
    assert claim.run(0).verdict in set(Verdict)
