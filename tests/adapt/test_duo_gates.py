"""Optimising gates: the two streams, the losses, learning, resuming."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.adapt.duo_attention import DuoAttention
from manyheads.adapt.duo_gates import optimise_gates, streaming_mask, two_way_hidden
from manyheads.objectives.distillation import gate_regulariser, hidden_distillation


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENS = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(0))


def test_open_gates_are_the_model_and_closed_gates_are_streaming(model) -> None:
    with torch.no_grad():
        plain = model.model(TOKENS).last_hidden_state
        full, mixed = two_way_hidden(model, TOKENS, torch.ones(2, 2), sinks=2, recent=4)
        _, closed = two_way_hidden(model, TOKENS, torch.full((2, 2), -0.5), sinks=2, recent=4)
        strict = DuoAttention(torch.zeros(2, 2, dtype=torch.bool), sinks=2, recent=4, strict_streaming_prefill=True)
        with strict(model):
            streaming = model.model(TOKENS, use_cache=False).last_hidden_state
    torch.testing.assert_close(full, plain)
    torch.testing.assert_close(mixed, plain)
    torch.testing.assert_close(closed, streaming)
    assert (closed - plain).abs().max() > 0.1


def test_gate_gradients_match_differences(model) -> None:
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    gates = (0.2 + 0.6 * torch.rand(2, 2)).double().requires_grad_()

    def loss(gates):
        full, mixed = two_way_hidden(double, TOKENS[:1], gates, sinks=1, recent=3)
        return (mixed - full).square().mean()

    # Llama's norms compute in float32 whatever the weights, so steps must stand out from float32's rounding.
    assert torch.autograd.gradcheck(loss, (gates,), eps=5e-3, atol=1e-3)


def test_only_gates_learn_and_the_model_is_left_alone(model) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def examples(step: int):
        return TOKENS[:1], torch.ones(1, 20, dtype=torch.bool)

    result = optimise_gates(model, examples=examples, steps=6, lr=0.05, sinks=1, recent=3, reg_weight=1.0)
    assert result.gates.shape == (2, 2)
    assert ((result.gates >= 0) & (result.gates < 1)).all()
    assert result.losses[0] == (0.0, 1.0)
    assert result.losses[-1][1] < 1
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_a_head_that_matters_stays_open(model) -> None:
    """With a cheap price gates stay open where closing them hurts; with a high price all close."""

    def examples(step: int):
        return TOKENS, torch.ones(2, 20, dtype=torch.bool)

    options = dict(examples=examples, steps=30, lr=0.1, sinks=1, recent=3)
    cheap = optimise_gates(model, reg_weight=0.0, **options).gates
    dear = optimise_gates(model, reg_weight=100.0, **options).gates
    assert cheap.mean() > 0.9
    assert dear.mean() < 0.1


def test_a_resumed_run_equals_a_whole_one(model, tmp_path) -> None:
    def examples(step: int):
        if stop_at == step:
            raise KeyboardInterrupt
        tokens = torch.randint(1, 97, (1, 16), generator=torch.Generator().manual_seed(step))
        return tokens, torch.ones(1, 16, dtype=torch.bool)

    options = dict(examples=examples, steps=30, lr=0.05, sinks=1, recent=3)
    stop_at = None
    whole = optimise_gates(model, **options)
    stop_at, state = 25, tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt):
        optimise_gates(model, resume=state, **options)
    stop_at = None
    resumed = optimise_gates(model, resume=state, **options)
    torch.testing.assert_close(resumed.gates, whole.gates)
    torch.testing.assert_close(torch.tensor(resumed.losses), torch.tensor(whole.losses))
    with pytest.raises(ValueError, match="other settings: lr"):
        optimise_gates(model, resume=state, **{**options, "lr": 0.1})
    state.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not the state"):
        optimise_gates(model, resume=state, **options)


def test_bad_input(model) -> None:
    with pytest.raises(ValueError, match="steps=0"):
        optimise_gates(model, steps=0)
    with pytest.raises(ValueError, match="tokenizer"):
        optimise_gates(model, steps=1)
    with pytest.raises(ValueError, match="recent=0"):
        two_way_hidden(model, TOKENS, torch.ones(2, 2), sinks=0, recent=0)
    with pytest.raises(ValueError, match=r"\(layers, kv heads\) = \(2, 2\)"):
        two_way_hidden(model, TOKENS, torch.ones(2, 4), sinks=0, recent=4)


def test_streaming_mask_by_its_rule() -> None:
    mask = streaming_mask(9, 2, 3)[0, 0]
    for i in range(9):
        for j in range(9):
            assert mask[i, j] == (j <= i and (i - j < 3 or j < 2))


def test_losses() -> None:
    student, teacher = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    supervised = torch.zeros(2, 5, dtype=torch.bool)
    supervised[0, 1] = supervised[1, 4] = True
    expected = ((student[0, 1] - teacher[0, 1]).square().mean() + (student[1, 4] - teacher[1, 4]).square().mean()) / 2
    loss = hidden_distillation(student, teacher, supervised)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None
    assert student.grad[0, 0].abs().sum() == 0
    assert gate_regulariser(torch.tensor([[-1.0, 0.5]])) == 0.75
    with pytest.raises(ValueError, match="no position"):
        hidden_distillation(student, teacher, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="share a shape"):
        hidden_distillation(student, teacher[:1])
    with pytest.raises(ValueError, match="supervised must be"):
        hidden_distillation(student, teacher, supervised[:1])
