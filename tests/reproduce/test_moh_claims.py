"""What the claims of MoH rest on, without their training: equal sizes, masks of equal size, the measure of use."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.interpret.attach import head_outputs
from manyheads.reproduce import moh
from manyheads.reproduce.claims import Verdict


def test_sizes_refute_but_do_not_confirm(monkeypatch) -> None:
    sizes = {"moh_transnext_small_80": 49_910_548, "moh_transnext_base_75": 90_020_632, "moh_dit_xl_2_90": 675_666_464}
    monkeypatch.setattr(moh, "create_model", lambda name: torch.nn.Linear(sizes[name], 1, bias=False))
    assert moh.published_sizes(0).verdict is Verdict.INCONCLUSIVE
    sizes["moh_transnext_base_75"] += 10**6
    assert moh.published_sizes(0).verdict is Verdict.REFUTED


def test_the_models_compared_differ_by_their_routers_only() -> None:
    counts = {choice: sum(p.numel() for p in moh._ViT(choice).parameters()) for choice in (None, (2, 4), (2, 2))}
    assert counts[(2, 4)] == counts[(2, 2)] == counts[None] + moh.BLOCKS * moh.WIDTH * (6 + 2 + 2)


def test_even_use_has_entropy_one_and_crowding_less() -> None:
    model = moh._ViT((2, 2))
    even = moh._entropy_of_use(model, 0)
    for _, mixer, _, _ in model.blocks:
        torch.nn.init.zeros_(mixer.router.wg.weight)
    crowded = moh._entropy_of_use(model, 0)
    assert crowded < even <= 1
    assert crowded == pytest.approx(torch.tensor(2.0).log().item() / torch.tensor(6.0).log().item(), abs=1e-5)


def test_random_heads_are_as_many_as_chosen_ones() -> None:
    sizes = dict(hidden_size=72, intermediate_size=32, num_hidden_layers=2, vocab_size=50, pad_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=9, num_key_value_heads=3, **sizes)).eval()
    used = []
    with moh._random_heads(model, 0), head_outputs(model, lambda layer, out: used.append(out.ne(0).any(-1))):
        model(torch.arange(1, 8)[None])
    assert torch.stack(used).sum(-1).eq(6).all()
    assert torch.stack(used)[..., :4].all()


@pytest.mark.parametrize(("gaps", "verdict"), [
    ((3.0, 2.0, 4.0, 1.5, 1.8), Verdict.CONFIRMED),
    ((3.0, 2.0, 4.0, 1.5, 2.4), Verdict.INCONCLUSIVE),
    ((4.1, 2.0, 4.0, 1.5, 1.8), Verdict.REFUTED),
])  # fmt: skip
def test_the_rule_on_query_norms(gaps: tuple[float, ...], verdict: Verdict, monkeypatch) -> None:
    with_norms, dense, at_random, dense_tuned, norms_tuned = gaps
    losses = iter([dense, with_norms, at_random])
    tuned = iter([dense_tuned, norms_tuned])
    model = torch.nn.Linear(1, 1)
    words = {"input_ids": list(range(4000))}
    monkeypatch.setattr(moh, "load_language_model", lambda *args, **kw: (model, lambda *args, **kw: words))
    monkeypatch.setattr(moh, "_loss", lambda *args: next(losses))
    monkeypatch.setattr(moh, "_tuned_loss", lambda *args: next(tuned))
    monkeypatch.setattr(moh, "_random_heads", lambda model, seed: moh._attached(model, None))
    monkeypatch.setattr(moh, "SMOLLM_HEADS", lambda model: moh._attached(model, None))
    assert moh.query_norms_choose_well(0).verdict is verdict
