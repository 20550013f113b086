"""The parameter-free router on tiny random models of several families, against masks written out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.adapt.mixture_of_heads import HeadRouting, MixtureOfHeads
from manyheads.data.cache_names import returned_cache, with_cache
from manyheads.interpret.attach import attention_function
from manyheads.ops import mixture_of_heads as operator

MOH = MixtureOfHeads(shared=2, active=1)


def tiny(kind: str = "llama", attention: str = "sdpa", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    if kind == "gpt2":
        sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, eos_token_id=None)
    config = AutoConfig.for_model(kind, **{**sizes, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            # Fresh query norms make all queries equally long.
            torch.nn.init.uniform_(parameter)
    return model


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def expected(model: torch.nn.Module, tokens: torch.Tensor, **given) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks where, after the model's own attention, every token keeps heads 0, 1 and its longest query."""
    masks = {}

    def keep(call, module, query, key, value, mask, **options):
        out, weights = call.original(module, query, key, value, mask, **options)
        kept = torch.zeros(*out.shape[:3], dtype=torch.bool)
        for b, t in torch.cartesian_prod(torch.arange(out.shape[0]), torch.arange(out.shape[1])).tolist():
            lengths = [float(query[b, head, t].square().sum()) for head in (2, 3)]
            kept[b, t, :2] = True
            kept[b, t, 2 + lengths.index(max(lengths))] = True
        masks[call.layer] = kept
        return out * kept[..., None], weights

    with attention_function(model, keep), torch.no_grad():
        logits = model(tokens, **given).logits
    return logits, torch.stack([masks[layer] for layer in sorted(masks)])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi3", "gpt2"])
def test_tokens_keep_the_shared_and_the_longest(kind: str) -> None:
    model, tokens = tiny(kind), ids(2, 9)
    logits, masks = expected(model, tokens)
    with MOH(model) as routing, torch.no_grad():
        found = model(tokens).logits
    torch.testing.assert_close(found, logits)
    assert routing.head_mask().equal(masks)
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, logits, atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_changes_nothing(attention: str) -> None:
    model, tokens = tiny(attention=attention), ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with MOH(model), torch.no_grad():
        batch = model(tokens, attention_mask=mask, position_ids=positions).logits
        alone = model(tokens[:1, 4:]).logits
        whole = model(tokens[1:]).logits
    torch.testing.assert_close(batch[:1, 4:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch[1:], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", ["dynamic", "static"])
def test_left_padded_prompts_generate_what_they_would_alone(llama, cached: str) -> None:
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cached}
    with MOH(llama), torch.no_grad():
        together = llama.generate(tokens, attention_mask=mask, **options)
        for row, start in ((0, 4), (1, 0)):
            alone = llama.generate(tokens[row : row + 1, start:], **options)
            assert alone[0, 9 - start :].equal(together[row, 9:])


def test_attention_that_is_not_causal_stays_so(llama) -> None:
    tokens = ids(1, 6)
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False
    try:
        # The model's mask builder leaves plain causal calls without a mask, so the module's word is what counts.
        logits, _ = expected(llama, tokens)
        with MOH(llama), torch.no_grad():
            torch.testing.assert_close(llama(tokens).logits, logits)
    finally:
        for layer in llama.model.layers:
            layer.self_attn.is_causal = True


def test_decoding_and_generating_from_a_cache_are_exact(llama) -> None:
    tokens = ids(2, 8)
    with MOH(llama), torch.no_grad():
        whole = llama(tokens).logits
        cache, rows = None, []
        for chunk in tokens.split([4, 1, 3], dim=1):
            out = llama(chunk, **with_cache(llama, cache))
            cache = returned_cache(out)
            rows.append(out.logits)
        torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-4, atol=1e-4)
        made = llama.generate(tokens[:1], max_new_tokens=4, do_sample=False)
        for end in range(8, 12):
            assert made[0, end] == llama(made[:, :end]).logits[0, -1].argmax()


def test_leaving_out_changes_no_number(llama, monkeypatch) -> None:
    tokens = ids(2, 40)
    with MOH(llama), torch.no_grad():
        all_heads = llama(tokens).logits
        computed = []
        gathered = operator._gathered
        monkeypatch.setattr(operator, "GATHER_KEYS", 1)
        monkeypatch.setattr(operator, "GATHER_SHARE", 1.9)
        monkeypatch.setattr(
            operator, "_gathered", lambda *args, most, **kw: computed.append(most) or gathered(*args, most=most, **kw)
        )
        torch.testing.assert_close(llama(tokens).logits, all_heads, rtol=1e-4, atol=1e-4)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[0, :7] = 0
        masked = llama(tokens, attention_mask=mask).logits
        assert min(computed) < 40
        monkeypatch.setattr(operator, "GATHER_KEYS", 1000)
        torch.testing.assert_close(masked[0, 7:], llama(tokens, attention_mask=mask).logits[0, 7:])


def test_routing_learns_straight_through_and_leaves_the_model_as_it_was(llama) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    tokens = ids(1, 12)
    with torch.no_grad():
        plain = llama(tokens).logits
    parameters = [layer.self_attn.q_proj.weight for layer in llama.model.layers]
    with MOH(llama) as routing:
        loss = llama(tokens, labels=tokens).loss
        with torch.no_grad():
            torch.testing.assert_close(llama(tokens, labels=tokens).loss, loss.detach())
        llama(tokens)
        balance = routing.balance_loss()
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, parameters))
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(balance, parameters))
    with torch.no_grad():
        assert llama(tokens).logits.equal(plain)
    assert all(value.equal(before[name]) for name, value in llama.state_dict().items())


def test_the_balance_loss_leaves_padding_out(llama) -> None:
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    with MOH(llama) as routing, torch.no_grad():
        llama(tokens, attention_mask=mask)
    real, losses = mask.bool(), []
    for found in routing.layers.values():
        means = found.probabilities[real].mean(0) * found.chosen[real].float().mean(0)
        losses.append(2 * means.sum())
    torch.testing.assert_close(routing.balance_loss(mask), torch.stack(losses).mean())


def test_dropout_and_other_backends_keep_to_the_models_own_attention() -> None:
    model = tiny(attention_dropout=0.5)
    tokens = ids(1, 9)
    with MOH(model), torch.no_grad():
        calm = model(tokens).logits
        model.train()
        assert not model(tokens).logits.equal(model(tokens).logits)
        model.eval()
        model_eager = tiny(attention="eager", attention_dropout=0.5)
        with MOH(model_eager):
            torch.testing.assert_close(model_eager(tokens).logits, calm, rtol=1e-4, atol=1e-4)


def test_the_published_share_of_heads(llama) -> None:
    assert MixtureOfHeads.published(llama) == MixtureOfHeads(shared=2, active=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: MixtureOfHeads(-1, 2), ValueError, "shared=-1 must not be negative"),
        (lambda model: MixtureOfHeads(1, 0), ValueError, "active=0 be at least 1"),
        (lambda model: MixtureOfHeads(2, 3)(model).__enter__(), ValueError, "active=3 heads .* = 2 routed ones"),
        (lambda model: MixtureOfHeads(3, 1)(model).__enter__(), ValueError, "leaves fewer than 2 to choose from"),
        (lambda model: HeadRouting().balance_loss(), ValueError, "no forward call"),
        (lambda model: HeadRouting().head_mask(), ValueError, "no forward call"),
    ],
)
def test_bad_input(llama, call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(llama)


def test_attaching_twice_is_refused(llama) -> None:
    with MOH(llama), pytest.raises(RuntimeError, match="attached to this model already"), MOH(llama):
        pass
