"""NiNformer: published size, the authors' layout, other image sizes, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from PIL import Image

from manyheads.layers.mixer_gate import MixerGating, TokenMixer
from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.recipes import recipe_for
from manyheads.models.training import make_optimizer
from manyheads.models.transforms import train_transform
from manyheads.models.vision.ninformer import AttentionBlock, GatedBlock, checkpoint_filter_fn

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "mlp_dim": 40, "token_dim": 12, "num_classes": 7}
OFFICIAL = (
    (r"^patch_embed\.", "patcher."),
    (r"^head\.", "classifier."),
    (r"^stages\.0\.blocks\.", "model."),
    (r"mixer\.token_norm\.", "Mixer.token_mix.0."),
    (r"mixer\.token_in\.", "Mixer.token_mix.2.net.0."),
    (r"mixer\.token_out\.", "Mixer.token_mix.2.net.3."),
    (r"mixer\.channel_norm\.", "Mixer.channel_mix.0."),
    (r"mixer\.channel_in\.", "Mixer.channel_mix.1.net.0."),
    (r"mixer\.channel_out\.", "Mixer.channel_mix.1.net.3."),
    (r"ffn\.fc1\.", "ffn.net.0."),
    (r"ffn\.fc2\.", "ffn.net.3."),
)


SIZES = [("ninformer_cifar10", 2_652_170), ("ninformer_cifar100", 2_675_300), ("ninformer_mnist", 2_643_978)]


def _small(**options) -> torch.nn.Module:
    return create_model("ninformer_cifar10", **{**SMALL, **options}).eval()


def _official(state: dict) -> dict:
    named = {}
    for key, value in state.items():
        for pattern, name in OFFICIAL:
            key = re.sub(pattern, name, key)
        named[key] = value
    return named


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_published_sizes(name: str, size: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"manyheads_{name}")
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert model.pretrained_cfg["input_size"] == (1 if name.endswith("mnist") else 3, 32, 32)
    n, t, c, f = 64, 512, 256, 512
    block = 2 * c + c * c + c + 4 * c + 2 * n * t + t + n + 2 * (2 * c * f + f + c)
    assert sum(parameter.numel() for parameter in model.stages[0].blocks[0].parameters()) == block


def test_the_block_reads_twice_through_one_norm() -> None:
    block = GatedBlock(6, 5, 3, 4, 0.5, 0.0).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.double)
    middle = x + block.mgu(block.norm(x))
    torch.testing.assert_close(block(x), middle + block.ffn(block.norm(middle)))
    assert len([name for name, _ in block.named_parameters() if name.startswith("norm.")]) == 2


def test_the_authors_layout() -> None:
    source, target = _small(), _small()
    state = _official(source.state_dict())
    expected = {"patcher.weight", "classifier.bias", "model.1.norm.weight", "model.0.mgu.proj.weight"}
    expected |= {"model.0.mgu.Mixer.token_mix.2.net.3.weight", "model.0.ffn.net.0.bias"}
    assert expected <= set(state)
    assert state["model.0.mgu.Mixer.token_mix.2.net.0.weight"].shape == (12, 16)
    load_checkpoint(target, {"state_dict": state}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    with pytest.raises(CheckpointError, match="other shapes"):
        load_checkpoint(_small(token_dim=13), state, checkpoint_filter_fn)


@pytest.mark.parametrize("mixer", ["gated", "mlp", "attention", "local"])
def test_a_file_of_another_image_size_is_resized_as_the_model_would_be(mixer: str) -> None:
    source, target = _small(mixer=mixer), _small(img_size=24, mixer=mixer)
    load_checkpoint(target, source.state_dict(), checkpoint_filter_fn)
    source.set_input_size((24, 24))
    x = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(target(x), source(x))
    oblong = _small(mixer=mixer, img_size=(12, 20))
    source.set_input_size((12, 20))
    oblong.load_state_dict(source.state_dict())
    y = torch.randn(1, 3, 12, 20)
    torch.testing.assert_close(oblong(y), source(y))
    assert source.forward_features(torch.randn(1, 3, 12, 20)).shape == (1, 3, 5, 24)
    with pytest.raises(ValueError, match=re.escape("images of 12 x 20 (15 tokens), got 24 x 24 (36 tokens)")):
        source(x)


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source, target = _small(), _small(num_classes=0)
    load_checkpoint(target, _official(source.state_dict()), checkpoint_filter_fn)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(target(x), source.forward_head(source.forward_features(x), pre_logits=True))
    torch.testing.assert_close(target(x), source.forward_features(x).mean((1, 2)))


def test_features_only(tmp_path) -> None:
    model = _small()
    torch.save(_official(model.state_dict()), tmp_path / "file.pth")
    net = create_model("ninformer_cifar10", checkpoint=tmp_path / "file.pth", features_only=True, **SMALL).eval()
    x = torch.randn(1, 3, 16, 16)
    assert [tuple(y.shape) for y in net(x)] == [(1, 24, 4, 4)]
    assert net.feature_info.channels() == [24]
    assert net.feature_info.reduction() == [4]
    torch.testing.assert_close(net(x), model.forward_intermediates(x, intermediates_only=True))


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _small(dropout=0.0).train()
    x = torch.randn(2, 3, 16, 16)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch.testing.assert_close(plain, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, model.num_features)


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    for options in ({}, {"dropout": 0.0, "drop_path_rate": 0.9}, {"dropout": 0.0, "drop_rate": 0.5}):
        model, x = _small(**options), torch.randn(4, 3, 16, 16)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_compiles_and_exports_with_a_free_batch(compiling: None) -> None:
    model, x = _small(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(more), model(more))


def test_bfloat16_stays_close_and_the_stream_wide() -> None:
    model, x = _small(), torch.randn(1, 3, 16, 16)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.forward_features(x).dtype == torch.float32
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_the_recipe_is_the_published_one() -> None:
    recipe = recipe_for("ninformer_cifar10")
    assert (recipe.lr, recipe.min_lr, recipe.warmup_epochs, recipe.linear_scaling) == (1e-3, 1e-3, 0, False)
    assert (recipe.epochs, recipe.weight_decay, recipe.label_smoothing, recipe.mixup) == (100, 0.0, 0.0, 0.0)
    groups = make_optimizer(_small(), 1e-3, recipe.weight_decay).param_groups
    assert all(group["weight_decay"] == 0 for group in groups)


def test_training_images_are_shifted_by_at_most_the_padding() -> None:
    image = Image.new("RGB", (32, 32), "white")
    crop = train_transform(_small(), 32, recipe_for("ninformer_cifar10"))
    for seed in range(8):
        torch.manual_seed(seed)
        pixels = crop(image)
        assert pixels.shape == (3, 32, 32)
        assert set(pixels.unique().tolist()) <= {-1.0, 1.0}
        shown = (pixels == 1).sum().item() / 3
        assert shown >= 28 * 28
        assert (pixels[:, 4:28, 4:28] == 1).all()


def test_the_layer_offers_the_formula_too() -> None:
    layer, x = MixerGating(6, 5, 3, 4, backend="reference"), torch.randn(2, 5, 6)
    fast = MixerGating(6, 5, 3, 4)
    fast.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), fast.eval()(x))


def test_the_baselines() -> None:
    assert isinstance(_small(mixer="mlp").stages[0].blocks[0], TokenMixer)
    vit = _small(mixer="attention")
    assert isinstance(vit.stages[0].blocks[0], AttentionBlock)
    assert vit.no_weight_decay() == {"pos_embed"}
    local = _small(mixer="local")
    assert local.no_weight_decay() == {"pos_embed"}
    assert {name for name in local.state_dict() if "dwconv.weight" in name}
    assert not _small().no_weight_decay()
    assert vit(torch.randn(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _small(img_size=18), "img_size=18 must be a multiple of patch_size=4"),
        (lambda: _small(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (lambda: _small(mlp_dim=0), "mlp_dim=0 must be at least 1"),
        (lambda: _small(embed_dim=-1), "embed_dim=-1"),
        (lambda: _small(mixer="conv"), "mixer='conv'"),
        (lambda: _small(mixer="mlp", drop_path_rate=0.1), "no stochastic depth"),
        (lambda: _small()(torch.randn(1, 1, 16, 16)), "image must be"),
        (lambda: _small()(torch.randn(1, 3, 32, 32)), r"\(16 tokens\), got 32 x 32 \(64 tokens\)"),
        (lambda: _small().set_input_size((18, 16)), "must be a multiple of patch_size=4"),
        (lambda: MixerGating(4, 0, 8), "tokens=0"),
        (lambda: MixerGating(4, 4, 8, backend="triton"), "backend='triton'"),
        (lambda: _small(img_size=(16, 16, 16)), "one number or"),
        (lambda: MixerGating(4, 4, 8, dropout=1.5), "dropout=1.5"),
        (lambda: MixerGating(4, 6, 8)(torch.randn(1, 5, 4)), "mix 6 tokens, x has 5"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
