"""The claims of DualToken-ViT: the nets they compare, and their rules."""

from __future__ import annotations

import pytest
import torch

from manyheads.reproduce import dualtoken_vit
from manyheads.reproduce.claims import Verdict


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert dualtoken_vit.published_sizes(0).verdict is Verdict.INCONCLUSIVE


def test_the_rivals_lack_what_they_should() -> None:
    x = torch.randn(1, 3, 64, 64)
    names = {}
    for build in (dualtoken_vit._without_tokens, dualtoken_vit._without_convolution, dualtoken_vit._at_once):
        model = build()
        assert model(x).shape == (1, 10)
        names[build.__name__] = {name.split(".")[4] for name in model.state_dict() if ".blocks." in name}
    assert "token_module" not in names["_without_tokens"]
    assert "conv_encoder" not in names["_without_convolution"]
    steps = [block.token_module.down for block in dualtoken_vit._blocks(dualtoken_vit._at_once())]
    assert [[step.factor for step in down] for down in steps] == [[4], [2], []]


def test_placeless_tokens_are_all_alike() -> None:
    tokens = dualtoken_vit._placeless().forward_tokens(torch.randn(2, 3, 64, 64))[1]
    means = tokens.mean(1, keepdim=True).expand_as(tokens)
    torch.testing.assert_close(tokens, means)
    whole = dualtoken_vit._whole().forward_tokens(torch.randn(2, 3, 64, 64))[1]
    assert not torch.allclose(whole, whole.mean(1, keepdim=True).expand_as(whole))


@pytest.mark.parametrize(
    ("constant", "verdict"), [(False, Verdict.CONFIRMED), (True, Verdict.REFUTED)], ids=["places", "no places"]
)
def test_the_probe_is_judged_by_the_rule(monkeypatch: pytest.MonkeyPatch, constant: bool, verdict: Verdict) -> None:
    def tokens(model, images) -> torch.Tensor:
        places = torch.eye(16).expand(8, -1, -1)
        return torch.zeros_like(places) if constant else places

    monkeypatch.setattr(dualtoken_vit, "train_classifier", lambda model, images, labels, epochs: None)
    monkeypatch.setattr(dualtoken_vit, "_last_tokens", tokens)
    assert dualtoken_vit.tokens_know_their_place(0).verdict is verdict


@pytest.mark.parametrize(
    ("rival", "verdict"), [(0.9, Verdict.CONFIRMED), (0.96, Verdict.INCONCLUSIVE), (0.99, Verdict.REFUTED)]
)
def test_only_the_best_is_best(rival: float, verdict: Verdict) -> None:
    scores = {"ours": [0.95, 0.96, 0.94], "other": [rival - 0.01, rival, rival + 0.01], "third": [0.8, 0.8, 0.81]}
    assert dualtoken_vit._is_best(scores, "ours").verdict is verdict
