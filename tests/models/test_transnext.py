"""TransNeXt: published sizes, the authors' layout, larger images, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import torch

from manyheads.models import create_model, load_checkpoint
from manyheads.models.evaluation import count_flops
from manyheads.models.recipes import recipe_for
from manyheads.models.training import make_optimizer
from manyheads.models.vision.transnext import TransNeXt, checkpoint_filter_fn

SMALL = {
    "embed_dims": (16, 32),
    "depths": (1, 2),
    "num_heads": (2, 4),
    "mlp_ratios": (4, 3),
    "sr_ratios": (4, 1),
    "img_size": 64,
    "num_classes": 7,
    "drop_path_rate": 0.0,
}
# Parameters, and multiply-adds in 1e9.
PUBLISHED = {
    "transnext_micro": (12_809_304, 2.7),
    "transnext_tiny": (28_258_960, 5.7),
    "transnext_small": (49_741_564, 10.3),
    "transnext_base": (89_721_496, 18.4),
    "transnext_small_384": (49_741_564, 32.1),
    "transnext_base_384": (89_721_496, 56.3),
    "transnext_micro_aaaa": (13_114_008, 3.3),
}


def _small(**options) -> TransNeXt:
    return create_model("transnext_micro", **{**SMALL, **options}).eval()


def _official(state: dict) -> dict:
    named = {}
    for key, value in state.items():
        for pattern, name in (
            (r"^stages\.(\d+)\.patch_embed\.", lambda match: f"patch_embed{int(match[1]) + 1}."),
            (r"^stages\.(\d+)\.blocks\.", lambda match: f"block{int(match[1]) + 1}."),
            (r"^stages\.(\d+)\.norm\.", lambda match: f"norm{int(match[1]) + 1}."),
            (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
            (r"\.position\.", "."),
        ):
            key = re.sub(pattern, name, key)
        named[key] = value[:, :, None, None] if key.endswith("attn.sr.weight") else value
    return named


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", ["transnext_micro"])
def test_published_operations(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name).eval()
        side = model.pretrained_cfg["input_size"][-1]
        operations = count_flops(model, torch.zeros(1, 3, side, side)) / 2e9
    # Products with shifted maps are no matrix products, so torch's counter leaves the neighbourhood out.
    assert operations == pytest.approx(PUBLISHED[name][1], rel=0.05)


def test_stages_attend_as_published() -> None:
    with torch.device("meta"):
        model, aaaa = create_model("transnext_tiny"), create_model("transnext_micro_aaaa")
    kinds = [type(stage.blocks[0].attn).__name__ for stage in model.stages]
    assert kinds == ["AggregatedAttention"] * 3 + ["CosineAttention"]
    assert {type(stage.blocks[0].attn).__name__ for stage in aaaa.stages} == {"AggregatedAttention"}
    assert [stage.blocks[0].attn.pooled_size((56 // 2**s,) * 2) for s, stage in enumerate(model.stages[:3])] == [
        (7, 7)
    ] * 3
    assert {stage.blocks[0].attn.proj.in_features // stage.blocks[0].attn.heads for stage in model.stages} == {24}


def test_the_authors_layout() -> None:
    source, target = _small(), _small()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    state = _official(source.state_dict())
    assert state["block1.0.attn.sr.weight"].shape == (16, 16, 1, 1)
    assert {"block2.1.attn.qkv.weight", "block1.0.attn.cpb_fc1.weight", "norm2.bias"} <= set(state)
    load_checkpoint(target, {"model": state}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source, backbone = _small(), _small(num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


@pytest.mark.parametrize("options", [{}, {"position_bias": "interpolate"}, {"fixed_pool_size": 2}])
@pytest.mark.parametrize("size", [(96, 128), (50, 77)])
def test_images_of_any_size(options: dict, size: tuple[int, int]) -> None:
    model = _small(**options)
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    rows, columns = (-(-side // 4) for side in size)
    assert [tuple(x.shape[2:]) for x in maps] == [(rows, columns), (-(-rows // 2), -(-columns // 2))]
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_both_position_biases_agree_at_the_trained_size_only() -> None:
    extrapolated, interpolated = _small(), _small(position_bias="interpolate")
    state = {name: value + 0.3 * torch.randn_like(value) for name, value in extrapolated.state_dict().items()}
    for model in (extrapolated, interpolated):
        model.load_state_dict(state)
    same, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(extrapolated(same), interpolated(same))
        assert not torch.allclose(extrapolated(other), interpolated(other), atol=1e-4)


def test_the_pre_training_size_sets_the_unit_of_distance() -> None:
    native, finetuned = _small(img_size=128), _small(img_size=128, pretrain_size=64)
    assert [stage.blocks[0].attn.position.side for stage in native.stages] == [(32, 32), (16, 16)]
    assert [stage.blocks[0].attn.position.side for stage in finetuned.stages] == [(16, 16), (8, 8)]


def test_every_stage_can_have_a_window_of_its_own() -> None:
    model = _small(window_size=(5, None))
    assert model.stages[0].blocks[0].attn.learnable_tokens.shape[-1] == 25
    with pytest.raises(ValueError, match="has none for stage 1, which pools by 2"):
        _small(window_size=(5, None), sr_ratios=(4, 2))


def test_images_need_not_be_square() -> None:
    square, wide = _small(), _small(img_size=(64, 128), position_bias="interpolate")
    wide.load_state_dict(square.state_dict())
    assert [stage.blocks[0].attn.position.side for stage in wide.stages] == [(16, 32), (8, 16)]
    x = torch.randn(1, 3, 64, 128)
    # At its own size nothing is interpolated.
    extrapolated = _small(img_size=(64, 128))
    extrapolated.load_state_dict(square.state_dict())
    torch.testing.assert_close(wide(x), extrapolated(x))


def test_the_epsilon_is_that_of_blocks_and_stages() -> None:
    model = _small(norm_eps=1e-3)
    found = {name.split(".")[-1]: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    pooled, embed = model.stages[0].blocks[0].attn.norm, model.stages[0].patch_embed.norm
    assert found["norm1"] == found["norm2"] == model.stages[0].norm.eps == 1e-3
    assert pooled.eps == embed.eps == 1e-5


def test_a_fixed_pool_needs_to_fit_the_image_at_hand_only() -> None:
    assert _small(fixed_pool_size=17, sr_ratios=(4, 2))(torch.randn(1, 3, 160, 160)).shape == (1, 7)


def test_features_only_loads_checkpoints(tmp_path) -> None:
    model = _small()
    torch.save({"model": _official(model.state_dict())}, tmp_path / "transnext.pth")
    net = create_model("transnext_micro", checkpoint=tmp_path / "transnext.pth", features_only=True, **SMALL).eval()
    x = torch.randn(2, 3, 50, 64)
    with torch.no_grad():
        for ours, expected in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(ours, expected)
    assert (net.feature_info.reduction(), net.feature_info.channels()) == ([4, 8], [16, 32])


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
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 32)


def test_the_recipe_spares_what_the_paper_spares() -> None:
    model = _small()
    groups = make_optimizer(model, 1e-3, 0.05).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    attn = model.stages[0].blocks[0].attn
    spared = (attn.temperature, attn.query_embedding, attn.relative_pos_bias_local, attn.position.cpb_fc1.weight)
    assert {decay[id(parameter)] for parameter in spared} == {0}
    assert decay[id(attn.learnable_tokens)] == decay[id(attn.q.weight)] == 0.05
    recipe = recipe_for("transnext_tiny")
    assert (recipe.linear_scaling, recipe.drop_path, recipe.clip_grad) == (False, 0.25, 1.0)
    assert recipe_for("transnext_base_384").epochs == 5


def test_export_survives_a_free_batch(compiling: None) -> None:
    model, x = _small(), torch.randn(2, 3, 48, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 48, 64)
    torch.testing.assert_close(program.module()(more), model(more))


def test_a_stage_compiles_whole(compiling: None) -> None:
    # The export test traces the other stage.
    stage, x = _small(depths=(1, 1)).stages[0], torch.randn(1, 32, 32, 3)
    torch.testing.assert_close(torch.compile(stage, fullgraph=True, backend="aot_eager")(x), stage(x))


def test_bfloat16_stays_close() -> None:
    model, x = _small(), torch.randn(1, 3, 48, 48)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, "differ in length"),
        ({"num_heads": (2, 5)}, "dim=32 is not a multiple of heads=5"),
        ({"window_size": 4}, "window=4 must be odd"),
        ({"pretrain_size": 32}, "pretrain_size=32 .* must be at least 64"),
        ({"position_bias": "bilinear"}, "mode='bilinear'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(shape))


def test_maps_too_small_to_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="a map of 2 x 8 is smaller than sr_ratio=4"):
        _small()(torch.randn(1, 3, 8, 32))
    with pytest.raises(ValueError, match="fixed_pool_size=8 must be below both sides of 8 x 8"):
        _small(fixed_pool_size=8)(torch.randn(1, 3, 32, 32))
