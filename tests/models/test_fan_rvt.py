"""FAN and RVT with token-aware pooling: published sizes, what timm expects of a model, training and evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.evaluation import evaluate_vision
from manyheads.models.image_data import ImageData, LabelledImages
from manyheads.models.recipes import Recipe, recipe_for
from manyheads.models.training import _Classifier, train_vision
from manyheads.models.vision import fan, rvt
from manyheads.models.vision.token_robustness import attention_maps
from manyheads.objectives.diversification import attention_diversification_loss

PARAMETERS = {
    "fan_tiny_tap": 7_404_688,
    "fan_small_tap": 28_513_048,
    "fan_base_tap": 54_643_360,
    "fan_large_tap": 80_992_468,
    "fan_tiny_hybrid_tap": 7_523_752,
    "fan_small_hybrid_tap": 26_257_704,
    "fan_base_hybrid_tap": 50_735_528,
    "fan_large_hybrid_tap": 77_238_644,
    "rvt_tiny_tap": 8_744_968,
    "rvt_small_tap": 22_316_104,
    "rvt_base_tap": 87_091_912,
    "rvt_tiny_plus_tap": 11_049_928,
    "rvt_small_plus_tap": 23_468_584,
    "rvt_base_plus_tap": 89_396_872,
}
SMALL = {
    "fan_tiny_tap": dict(embed_dim=16, depth=2, num_heads=2),
    "fan_tiny_hybrid_tap": dict(embed_dim=16, depth=2, num_heads=2, conv_depths=(1, 1), conv_dims=(8, 12)),
    "rvt_tiny_plus_tap": dict(base_dims=(8, 8), depths=(2, 1), num_heads=(2, 4), masked_blocks=1),
}


def _small(name: str, **options) -> torch.nn.Module:
    return create_model(name, **{**SMALL[name], "num_classes": 7, **options}).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALL)
def test_features_and_other_sizes(name: str) -> None:
    model = _small(name)
    x = torch.randn(2, 3, 96, 64)
    _, maps = model.forward_intermediates(x)
    sides = [(6, 4), (6, 4)] if "fan" in name else [(6, 4), (3, 2)]
    widths = [16, 16] if "fan" in name else [16, 32]
    assert [tuple(m.shape) for m in maps] == [(2, w, *side) for w, side in zip(widths, sides)]
    net = create_model(name, features_only=True, out_indices=(0, 1), num_classes=7, **SMALL[name]).eval()
    load_checkpoint(
        net.model,
        {k: v for k, v in model.state_dict().items() if k in net.model.state_dict()},
    )
    for ours, expected in zip(net(x), maps, strict=True):
        torch.testing.assert_close(ours, expected)
    assert net.feature_info.channels() == widths
    assert model(torch.randn(1, 3, 75, 101)).shape == (1, 7)


def test_the_fourier_position_is_the_formula() -> None:
    embed = fan.FourierPosition(5)
    height, width = 3, 4
    expected = torch.zeros(64, height, width)
    for i in range(height):
        for j in range(width):
            for f in range(32):
                frequency = 10000 ** (2 * (f // 2) / 32)
                wave = torch.cos if f % 2 else torch.sin
                two_pi = 2 * torch.pi
                expected[f, i, j] = wave(torch.tensor(two_pi * (i + 1) / (height + 1e-6) / frequency))
                expected[32 + f, i, j] = wave(torch.tensor(two_pi * (j + 1) / (width + 1e-6) / frequency))
    conv = embed.token_projection
    found = embed(torch.zeros(1, 5, height, width))
    torch.testing.assert_close(found, F.conv2d(expected[None], conv.weight, conv.bias))


def test_norms_of_the_hybrid_divide_by_one_less() -> None:
    x = torch.randn(2, 6, 3, 4)
    for unbiased in (False, True):
        norm = fan.ChannelNorm(6, unbiased=unbiased)
        variance = x.var(1, keepdim=True, correction=int(unbiased))
        torch.testing.assert_close(norm(x), (x - x.mean(1, keepdim=True)) / (variance + 1e-6).sqrt())
    stem = _small("fan_tiny_hybrid_tap").patch_embed.backbone
    norms = {name: m.unbiased for name, m in stem.named_modules() if isinstance(m, fan.ChannelNorm)}
    assert [name for name, unbiased in norms.items() if not unbiased] == ["stem.1"]
    assert len(norms) == 4


def test_masks_scale_the_logits_and_have_an_end() -> None:
    layer = rvt.MaskedAttention(8, 2, mask_tokens=9).eval()
    x = torch.randn(2, 6, 8)
    q, k, v = (t.view(2, 6, 2, 4).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    logits = q @ k.mT / 2 * layer.att_mask[:, :6, :6].sigmoid()
    torch.testing.assert_close(layer(x), layer.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 8)))
    with pytest.raises(ValueError, match="10 tokens, but att_mask is for at most 9"):
        layer(torch.randn(1, 10, 8))
    model = _small("rvt_tiny_plus_tap")
    masked = [b.attn.att_mask is not None for stage in model.transformers for b in stage.blocks]
    assert masked == [True, False, False]
    assert _small("rvt_tiny_plus_tap", mask_tokens=400)(torch.randn(1, 3, 320, 320)).shape == (1, 7)


@pytest.mark.parametrize("name", SMALL)
def test_official_files_load(name: str, tmp_path) -> None:
    model = _small(name)
    state = {key.replace("transformers.1.downsample", "pools.0.conv"): v for key, v in model.state_dict().items()}
    state = {k: v[:, :, 0, 0] if v.ndim == 4 and ".mlp.fc" in k and ".stages." in k else v for k, v in state.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "tapadl.pth.tar")
    again = create_model(name, checkpoint=tmp_path / "tapadl.pth.tar", num_classes=7, **SMALL[name]).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x))
    bare = _small(name, num_classes=0, checkpoint=tmp_path / "tapadl.pth.tar")
    torch.testing.assert_close(bare(x), model.forward_head(model.forward_features(x), pre_logits=True))
    with pytest.raises(CheckpointError, match="dilation_predictor"):
        _small(name, num_scales=0, checkpoint=tmp_path / "tapadl.pth.tar")


@pytest.mark.parametrize("name", SMALL)
def test_recomputing_activations_gives_the_same_gradients(name: str) -> None:
    model = _small(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.randn(2, 3, 64, 64)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch.testing.assert_close(plain, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def test_drop_path_is_constant_in_fan_and_rises_in_rvt() -> None:
    rates = [block.drop_path.drop_prob for block in _small("fan_tiny_tap", drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0.3, 0.3])
    model = _small("rvt_tiny_plus_tap", drop_path_rate=0.4)
    rising = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.transformers for b in stage.blocks]
    assert rising == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize("name", SMALL)
def test_classifier_and_channels_can_be_others(name: str) -> None:
    model = _small(name, in_chans=1)
    model.reset_classifier(2)
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, model.num_features)


def test_the_large_hybrids_head_starts_small() -> None:
    head = _small("fan_tiny_hybrid_tap", head_gain=0.001).head
    assert head.weight.abs().max() < 1e-3


@pytest.mark.parametrize("name", ["fan_tiny_hybrid_tap", "rvt_tiny_plus_tap"])
def test_export_survives_a_free_batch(name: str, compiling: None) -> None:
    model = _small(name, **({"depth": 1} if "fan" in name else {"depths": (1, 1)}))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        more = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(program.module()(more), model(more))


def test_compiles_whole(compiling: None) -> None:
    model = _small("rvt_tiny_plus_tap", base_dims=(8,), depths=(1,), num_heads=(2,))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_stays_close(name: str) -> None:
    model = _small(name)
    x = torch.randn(1, 3, 64, 64)
    exact = model(x)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fan_tiny_tap", {"embed_dim": 12}, "embed_dim=12 must be a multiple of 8"),
        ("fan_tiny_hybrid_tap", {"conv_dims": (8,)}, "differ in length"),
        ("rvt_tiny_plus_tap", {"depths": (1,)}, "differ in length"),
        ("rvt_tiny_plus_tap", {"patch_size": 6}, "patch_size=6 must be a multiple of 4"),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(name, **options)


@pytest.mark.parametrize("name", SMALL)
def test_bad_images(name: str) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small(name)(torch.randn(1, 4, 64, 64))
    with pytest.raises(ValueError, match="too small for patches of 16"):
        _small("rvt_tiny_plus_tap")(torch.randn(1, 3, 16, 64))


def test_the_loss_pays_for_overfocusing() -> None:
    network = _small("fan_tiny_tap").train()
    for block in network.blocks:
        torch.nn.init.normal_(block.attn.kv.weight, std=3)
        torch.nn.init.normal_(block.attn.q.weight, std=3)
        block.dilation_predictor.eval()
    x, labels = torch.randn(2, 3, 96, 96), torch.tensor([0, 1])
    with attention_maps(network) as maps:
        network(x)
    adl = attention_diversification_loss(maps)
    plain, paying = (
        _Classifier(network, Recipe(diversification=weight), None)(x, labels)["loss"] for weight in (0.0, 2.0)
    )
    torch.testing.assert_close(paying, plain + 2 * adl)
    assert adl > 0.1
    network.eval()
    evaluated = _Classifier(network, Recipe(diversification=2.0), None).eval()(x, labels)["loss"]
    torch.testing.assert_close(evaluated, F.cross_entropy(network(x), labels))


def test_training_and_corrupted_evaluation_run(tmp_path) -> None:
    assert recipe_for("fan_base_hybrid_tap").diversification == 1
    assert recipe_for("davit_tiny").diversification == 0

    def read(index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (32, 32), (40 * index % 256, 99, 20)), index % 5

    data = ImageData(LabelledImages(16, read), LabelledImages(12, read), 5, 32)
    options = {"embed_dim": 8, "depth": 1, "num_heads": 1, "class_depth": 1}
    result = train_vision(
        "fan_tiny_tap", data, output=tmp_path, epochs=1, batch_size=8, device="cpu", diversification=2.0,
        model_options=options, progress=False,
    )  # fmt: skip
    assert result.settings["recipe"]["diversification"] == 2
    with pytest.raises(ValueError, match="must not be negative"):
        train_vision("fan_tiny_tap", data, output=tmp_path / "x", batch_size=8, diversification=-1.0)
    found = [
        evaluate_vision(
            "fan_tiny_tap", data, checkpoint=tmp_path, corruptions=("contrast", "gaussian_noise"), severities=(3,),
            model_options=options, progress=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert list(found[0].corruptions) == ["contrast", "gaussian_noise"]
    assert all(0 <= error <= 1 for error in found[0].corruptions.values())
    assert found[0].corruptions == found[1].corruptions
    with pytest.raises(ValueError, match="'rain' is not one of"):
        evaluate_vision("fan_tiny_tap", data, corruptions=("rain",), model_options=options)
