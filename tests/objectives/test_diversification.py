"""The attention diversification loss against its equation, and attention maps of any backbone."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import VisionTransformer
from transformers import AutoConfig, AutoModel

from manyheads.engines import dense_columns
from manyheads.layers.tap import PooledNorm
from manyheads.models import create_model
from manyheads.models.vision.token_robustness import add_token_pooling, attention_inputs, attention_maps
from manyheads.objectives.diversification import (
    SoftmaxInput,
    attention_diversification_loss,
    diversification_from_queries,
    overfocus,
)

VIT = "vit_tiny_patch16_224"


def _by_hand(maps: list[torch.Tensor], threshold: float) -> float:
    total = 0.0
    for weights in maps:
        batch, heads, n, _ = weights.shape
        for image in weights:
            mean = image.sum(0) / heads
            average = mean.sum(0) / n
            average = torch.where(average > threshold / n, average, 0.0)
            for row in mean:
                row = torch.where(row > threshold / n, row, 0.0)
                norms = max(row.norm().item(), 1e-8) * max(average.norm().item(), 1e-8)
                total += float(row @ average) / norms / (batch * n)
    return total / (len(maps) + 1e-6)


def _maps(batch: int = 2) -> list[torch.Tensor]:
    sizes = ((3, 6), (2, 9))
    return [
        (3 * torch.randn(batch, heads, n, n).double() + 2 * torch.randn(n).double()).softmax(-1) for heads, n in sizes
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threshold", [0.5, 1, 2])
def test_loss_is_the_equation_for_every_batch(batch: int, threshold: float) -> None:
    maps = _maps(batch)
    loss = attention_diversification_loss(maps, threshold=threshold)
    assert loss.dtype == torch.double
    assert loss.item() == pytest.approx(_by_hand(maps, threshold), rel=1e-6)


def test_gradients() -> None:
    raw = (2 * torch.randn(2, 2, 4, 4).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_diversification_loss([x.softmax(-1)], threshold=1.3), (raw,))


def test_uniform_attention_costs_nothing_and_gives_no_gradient() -> None:
    raw = torch.zeros(1, 2, 9, 9, requires_grad=True)
    loss = attention_diversification_loss([raw.softmax(-1)])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(raw.grad, torch.zeros_like(raw))


def test_half_precision_is_summed_in_float32() -> None:
    maps = _maps()
    loss = attention_diversification_loss([weights.bfloat16() for weights in maps])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(attention_diversification_loss(maps).item(), abs=0.02)


def test_overfocus_is_the_favourite_tokens_share() -> None:
    weights = torch.zeros(1, 2, 4, 4)
    weights[..., 1] = 0.7
    weights[..., 2] = 0.3
    assert overfocus(weights) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_diversification_loss([]), "at least one layer"),
        (lambda: attention_diversification_loss([torch.rand(1, 2, 3, 4)]), r"must be \(batch, heads, N, N\)"),
        (lambda: attention_diversification_loss(_maps(), threshold=0), "threshold=0 must be positive"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_any_token_backbone_gets_pooling_and_shows_its_attention(name: str) -> None:
    options = {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)} if "swin" in name else {"depth": 2}
    model = timm.create_model(name, img_size=64, num_classes=5, **options).eval()
    before, count = model(x := torch.randn(2, 3, 64, 64)), sum(1 for _ in model.parameters())
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    add_token_pooling(model)
    assert sum(1 for _ in model.parameters()) == count + 4 * 2
    with attention_maps(model) as maps:
        after = model(x)
    assert not torch.allclose(after, before)
    assert len(maps) == 2
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)
    loss = attention_diversification_loss(maps, threshold=0.5)
    assert loss.requires_grad
    loss.backward()
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused


def test_models_without_visible_attention_are_told() -> None:
    with (
        pytest.raises(ValueError, match="no attention of Sequential can return its weights"),
        attention_maps(nn.Sequential(nn.Linear(2, 2))),
    ):
        pass
    mixed = nn.ModuleList(
        [nn.MultiheadAttention(4, 2), timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)]
    )
    with pytest.warns(UserWarning, match="MultiheadAttention cannot return"), attention_maps(mixed):
        pass
    with pytest.raises(ValueError, match="no block in front of which TAP could stand; tried norm1 and attn"):
        add_token_pooling(nn.Linear(2, 2))
    vit = add_token_pooling(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    with pytest.raises(ValueError, match="has token-aware pooling already"):
        add_token_pooling(vit)


@pytest.mark.parametrize(("kind", "prefix"), [("vit", 1), ("dinov2_with_registers", 5), ("siglip_vision_model", 0)])
def test_transformers_backbones_have_both(kind: str, prefix: int) -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32)
    config = AutoConfig.for_model(kind, patch_size=8, **sizes)
    model = add_token_pooling(AutoModel.from_config(config, attn_implementation="eager")).eval()
    pools = [module for module in model.modules() if isinstance(module, PooledNorm)]
    assert [pool.prefix for pool in pools] == [prefix] * 2
    out = model(torch.randn(1, 3, 32, 32), output_attentions=True)
    assert out.last_hidden_state.shape == (1, 16 + prefix, 16)
    assert 0 <= attention_diversification_loss(out.attentions) <= 1


def test_other_libraries_and_hosts_have_pooling() -> None:
    images = torch.randn(1, 3, 32, 32)
    torchvision = add_token_pooling(VisionTransformer(32, 8, 1, 2, 16, 16, num_classes=5))
    assert torchvision(images).shape == (1, 5)
    host = create_model(
        "inline_deit_tiny", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=5
    )
    assert add_token_pooling(host)(images).shape == (1, 5)
    assert host.blocks[0].norm1.prefix == 1
    with pytest.raises(ValueError, match="SwinTransformerV2Block stands behind the attention"):
        add_token_pooling(timm.create_model("swinv2_tiny_window8_256", depths=(1, 1), num_heads=(1, 1), embed_dim=8))


def _layer(batch: int, heads: int, n: int, dtype: torch.dtype = torch.double) -> list[torch.Tensor]:
    """Queries and keys; one key is every query's favourite, so that there is something to lose."""
    query, key = 2 * torch.randn(2, batch, heads, n, 5, dtype=torch.double)
    key[:, :, 0] += 2 * query.mean(2)
    return [part.to(dtype).requires_grad_() for part in (query, key)]


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    n=st.integers(1, 9),
    tile=st.integers(1, 400),
    scale=st.none() | st.floats(-1, 1),
    threshold=st.floats(0.3, 2.5),
)
@settings(max_examples=60, deadline=None)
def test_blocks_of_queries_give_the_loss_of_maps(
    batch: int, heads: int, n: int, tile: int, scale: float | None, threshold: float
) -> None:
    inputs = _layer(batch, heads, n)
    factor = 5**-0.5 if scale is None else scale
    maps = (factor * inputs[0] @ inputs[1].mT).softmax(-1)
    mean = maps.mean(1)
    # The loss jumps where a weight is just the threshold; there rounding decides.
    assume(all((part * n - threshold).abs().min() > 1e-9 for part in (mean, mean.mean(1))))
    expected = attention_diversification_loss([maps], threshold=threshold)
    with mock.patch.dict(dense_columns._TILE, cpu=tile):
        term = diversification_from_queries(*inputs, scale=scale, threshold=threshold)
        found = torch.autograd.grad(2 * term, inputs)
    torch.testing.assert_close(term / (1 + 1e-6), expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(found, torch.autograd.grad(2 * (1 + 1e-6) * expected, inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tile", [20, 10**6])
def test_gradients_from_queries(tile: int) -> None:
    inputs = _layer(2, 2, 5)
    assert diversification_from_queries(*inputs, threshold=1.3) > 0.1
    with mock.patch.dict(dense_columns._TILE, cpu=tile):
        assert torch.autograd.gradcheck(lambda q, k: diversification_from_queries(q, k, threshold=1.3), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_queries_in_half_precision_are_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    inputs = _layer(2, 3, 8, dtype)
    exact = [part.detach().float().requires_grad_() for part in inputs]
    with torch.autocast("cpu", dtype, enabled=autocast):
        term = diversification_from_queries(*inputs)
    expected = diversification_from_queries(*exact)
    assert term.dtype == torch.float32
    torch.testing.assert_close(term, expected, rtol=0, atol=0)
    for ours, theirs in zip(torch.autograd.grad(term, inputs), torch.autograd.grad(expected, exact)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=0)


def test_no_tile_is_larger_than_a_row_of_all_heads() -> None:
    inputs, sizes, weights = _layer(2, 3, 50), [], dense_columns._weights

    def noted(*arguments):
        sizes.append((found := weights(*arguments)).numel())
        return found

    with mock.patch.dict(dense_columns._TILE, cpu=700), mock.patch.object(dense_columns, "_weights", noted):
        diversification_from_queries(*inputs).backward()
    assert max(sizes) <= 700
    assert sum(sizes) == 3 * 2 * 3 * 50 * 50


def test_the_term_compiles(compiling: None) -> None:
    compiled = torch.compile(diversification_from_queries, fullgraph=True, backend="aot_eager")
    inputs = _layer(2, 2, 6)
    torch.testing.assert_close(compiled(*inputs), diversification_from_queries(*inputs))
    ours, theirs = (torch.autograd.grad(call(*inputs), inputs) for call in (compiled, diversification_from_queries))
    torch.testing.assert_close(ours, theirs)


def test_bad_queries() -> None:
    query, key = _layer(1, 2, 4)
    with pytest.raises(ValueError, match=r"got \(1, 2, 4, 5\) and \(1, 2, 3, 5\)"):
        diversification_from_queries(query, key[:, :, :3])
    with pytest.raises(ValueError, match="threshold=-1 must be positive"):
        diversification_from_queries(query, key, threshold=-1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224", {"depth": 2, "qk_norm": True, "attn_drop_rate": 0.0}),
        ("swin_tiny_patch4_window7_224", {"depths": (2, 1), "embed_dim": 12, "num_heads": (1, 2)}),
        ("rvt_tiny_plus_tap", {"base_dims": (8,), "depths": (2,), "num_heads": (2,), "masked_blocks": 1}),
        ("fan_tiny_tap", {"embed_dim": 8, "depth": 2, "num_heads": 2, "class_depth": 1}),
    ],
)
def test_fused_attention_shows_what_its_maps_come_from(name: str, options: dict) -> None:
    ours = "tap" in name
    model = (create_model if ours else partial(timm.create_model, img_size=64))(name, num_classes=5, **options).eval()
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            for part in module.children():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=1)
    images = torch.randn(2, 3, 64, 64)
    with attention_maps(model) as maps:
        model(images)
    with attention_inputs(model) as layers:
        logits = model(images)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    assert len(maps) == len(layers)
    assert any(isinstance(layer, SoftmaxInput) for layer in layers) == ("swin" not in name)
    assert any(isinstance(layer, torch.Tensor) for layer in layers) == ("swin" in name or "rvt" in name)
    expected, loss = (attention_diversification_loss(each, threshold=1.1) for each in (maps, layers))
    assert loss > 0.05
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    gradients = [
        torch.cat([
            grad.flatten() for grad in torch.autograd.grad(each, list(model.parameters()), allow_unused=True)
            if grad is not None
        ])
        for each in (expected, loss)
    ]  # fmt: skip
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())
    with attention_inputs(model) as layers:
        pass
    assert not layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_causal_and_grouped_calls_show_their_weights() -> None:
    class Attention(nn.Module):
        fused_attn = True

        def __init__(self, **options) -> None:
            super().__init__()
            self.attn_drop, self.options = nn.Dropout(0.0), options

        def forward(self, query, key):
            return nn.functional.scaled_dot_product_attention(query, key, key, **self.options)

    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    with attention_inputs(layer := Attention(is_causal=True, enable_gqa=True)) as layers:
        out = layer(query, key)
    torch.testing.assert_close(layers[0] @ key.repeat_interleave(2, 1), out)
    allowed = torch.rand(5, 5) > 0.5
    allowed.fill_diagonal_(True)
    with attention_inputs(layer := Attention(attn_mask=allowed, scale=0.3)) as layers:
        out = layer(query, query)
    torch.testing.assert_close(layers[0] @ query, out)

    class Other(Attention):
        def forward(self, query, key):
            return query

    with pytest.raises(ValueError, match="Other shows neither"), attention_inputs(layer := Other()):
        layer(query, key)
