"""The attention diversification loss against its equation, and attention maps of any backbone."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer
from transformers import AutoConfig, AutoModel

from manyheads.layers.tap import PooledNorm
from manyheads.models import create_model
from manyheads.models.vision.token_robustness import add_token_pooling, attention_maps
from manyheads.objectives.diversification import attention_diversification_loss, overfocus

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
