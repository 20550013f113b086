"""LITv2: published sizes with every alpha, the authors' layout, any image size, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import torch

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.evaluation import count_flops
from manyheads.models.training import make_optimizer
from manyheads.models.vision.litv2 import LITv2, LITv2Dense, checkpoint_filter_fn

SMALL = {
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "attention": (False, True),
    "windows": (0, 2),
    "alpha": 0.5,
    "num_classes": 7,
    "drop_path_rate": 0.0,
}
# Parameters, and multiply-adds in 1e9 at 224 pixels (the sheet counts norms too).
PUBLISHED = {
    "litv2_small": (27_844_000, 3.73),
    "litv2_medium": (48_830_368, 7.48),
    "litv2_base": (86_520_704, 13.19),
    "litv2_small_alpha0": (28_089_760, 3.97),
    "litv2_small_alpha20": (27_844_000, 3.88),
    "litv2_small_alpha40": (27_696_544, 3.82),
    "litv2_small_alpha50": (27_647_392, 3.77),
    "litv2_small_alpha70": (27_696_544, 3.74),
    "litv2_small_alpha100": (28_089_760, 3.75),
}


def _small(**options) -> LITv2:
    return create_model("litv2_small", **{**SMALL, **options}).eval()


def _official(key: str) -> str:
    for pattern, name in (
        (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
        (r"\.downsample\.conv\.", ".downsample.dconv."),
        (r"\.downsample\.offset\.", ".downsample.dconv.conv_offset."),
        (r"\.downsample\.norm\.", ".downsample.norm_layer."),
    ):
        key = re.sub(pattern, name, key)
    return key


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_operations(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name).eval()
        operations = count_flops(model, torch.zeros(1, 3, 224, 224)) / 2e9
    parameters, published = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert operations == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", ["litv2_base_384", "litv2_small_ws4", "litv2_medium_ws4", "litv2_base_ws4"])
def test_other_sizes_and_windows_have_the_same_parameters(name: str) -> None:
    with torch.device("meta"):
        models = create_model(name), create_model("_".join(name.split("_")[:2]))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "split"), [("litv2_small", (10, 2)), ("litv2_base", (14, 2))])
def test_alpha_splits_the_heads_of_stage_three(name: str, split: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    third, fourth = (model.layers[stage].blocks[0].attn for stage in (2, 3))
    assert (third.low_heads, third.high_heads) == split
    assert fourth.high_heads == 0
    assert model.layers[1].blocks[0].attn is None


def test_the_authors_layout_with_what_the_trainer_left() -> None:
    source, target = _small(), _small()
    state = {_official(key): value for key, value in source.state_dict().items()}
    assert "layers.0.downsample.dconv.conv_offset.weight" in state
    load_checkpoint(target, {"model": state, "optimizer": {}, "epoch": 3}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_a_file_with_another_alpha_is_named() -> None:
    state = {_official(key): value for key, value in _small(alpha=0.25).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the file has 1 low-frequency heads of 4 .* the model has 2"):
        load_checkpoint(_small(), state, checkpoint_filter_fn)
    all_low = {_official(key): value for key, value in _small(alpha=1).state_dict().items()}
    with pytest.raises(CheckpointError, match="the file has 4 low-frequency heads of 4"):
        load_checkpoint(_small(), all_low, checkpoint_filter_fn)


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source, backbone = _small(), _small(num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


@pytest.mark.parametrize("size", [(64, 64), (30, 45), (8, 70)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = _small()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    rows, columns = (-(-side // 4) for side in size)
    assert [tuple(x.shape[2:]) for x in maps] == [(rows, columns), (rows // 2, columns // 2)]
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_the_classifiers_sizes_can_be_demanded() -> None:
    model = _small(any_size=False)
    assert model(torch.randn(1, 3, 32, 16)).shape == (1, 7)
    with pytest.raises(ValueError, match="does not divide into patches"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match="sides must be even"):
        model(torch.randn(1, 3, 36, 32))
    with pytest.raises(ValueError, match="window=2 does not divide a map of 3 x 4"):
        model(torch.randn(1, 3, 24, 32))


def test_filling_up_an_image_is_padding_it_by_hand() -> None:
    model, x = _small(), torch.randn(1, 3, 30, 45)
    torch.testing.assert_close(model(x), model(torch.nn.functional.pad(x, (0, 3, 0, 2))))


def test_features_only_loads_checkpoints(tmp_path) -> None:
    model = _small()
    torch.save({"model": {_official(k): v for k, v in model.state_dict().items()}}, tmp_path / "litv2.pth")
    net = create_model("litv2_small", checkpoint=tmp_path / "litv2.pth", features_only=True, **SMALL).eval()
    x = torch.randn(2, 3, 50, 33)
    for ours, expected in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, expected)
    assert (net.feature_info.reduction(), net.feature_info.channels()) == ([4, 8], [16, 32])


def test_intermediates_choose_stages() -> None:
    model, x = _small(), torch.randn(1, 3, 40, 40)
    last, (kept,) = model.forward_intermediates(x, indices=1, norm=True)
    torch.testing.assert_close(kept.permute(0, 2, 3, 1), last)
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert first.shape == (1, 16, 10, 10)
    with pytest.raises(ValueError, match="do not name stages"):
        model.forward_intermediates(x, indices=[2])


def test_dense_backbone_norms_every_map() -> None:
    model, x = _small(), torch.randn(1, 3, 42, 38)
    dense = LITv2Dense(model, out_indices=(0, 1))
    torch.nn.init.normal_(dense.norm0.weight)
    first, second = model.forward_intermediates(x, intermediates_only=True)
    pairs = (dense.norm0, first), (dense.norm1, second)
    expected = [norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, y in pairs]
    torch.testing.assert_close(dense(x), expected)
    assert not [name for name in dense.state_dict() if name.startswith("head")]
    state = {_official(key): value for key, value in dense.state_dict().items()}
    load_checkpoint(LITv2Dense(_small(), (0, 1)), state, checkpoint_filter_fn)


def test_offsets_learn_at_a_hundredth_of_the_rate() -> None:
    model = _small()
    groups = make_optimizer(model, 1e-3, 0.05).param_groups
    rates = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    offset, conv = model.layers[0].downsample.offset, model.layers[0].downsample.conv
    assert rates[id(offset.weight)] == pytest.approx((1e-5, 0.05))
    assert rates[id(offset.bias)] == pytest.approx((1e-5, 0))
    assert rates[id(conv.weight)] == pytest.approx((1e-3, 0.05))
    assert rates[id(model.norm.weight)] == pytest.approx((1e-3, 0))


def test_it_starts_as_published() -> None:
    model = create_model("litv2_small", **{**SMALL, "embed_dim": 64})
    assert model.layers[0].downsample.offset.weight.eq(0).all()
    ffn = model.layers[0].blocks[0].mlp
    assert ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert ffn.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)


def test_drop_path_rises_over_all_blocks() -> None:
    model = _small(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.25, 0.5])


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _small().train()
    x = torch.randn(2, 3, 40, 33)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 32)


def test_export_survives_a_free_batch(compiling: None) -> None:
    model, x = _small(), torch.randn(2, 3, 44, 36)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 44, 36)
    torch.testing.assert_close(program.module()(more), model(more))


def test_compiles_whole(compiling: None) -> None:
    model, x = _small(), torch.randn(1, 3, 44, 36)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_bfloat16_stays_close() -> None:
    model, x = _small(), torch.randn(1, 3, 40, 40)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, "differ in length"),
        ({"num_heads": (2, 5)}, "dim=32 is not a multiple of heads=5"),
        ({"alpha": 1.2}, r"alpha=1\.2 must be between"),
        ({"windows": (0, 0)}, "window must be at least 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(shape))


def test_an_image_smaller_than_a_last_token_is_refused() -> None:
    with pytest.raises(ValueError, match="with sides of at least 2"):
        _small()(torch.randn(1, 3, 4, 32))
