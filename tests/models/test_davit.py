"""DaViT: published sizes, four checkpoint layouts, timm and transformers as oracles, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.vision.davit import DaViT, DaViTDense, checkpoint_filter_fn

SMALL = {"depths": (1, 2), "embed_dims": (16, 32), "num_heads": (2, 4), "window_size": 4, "num_classes": 7}
PARAMETERS = {
    "davit_tiny": 28_360_168,
    "davit_small": 49_745_896,
    "davit_base": 87_954_408,
    "davit_large": 196_811_752,
    "davit_huge": 348_922_856,
    "davit_giant": 1_406_470_120,
    "davit_base_fl": 90_370_048,
    "davit_huge_fl": 360_636_416,
}


def _small(**options) -> DaViT:
    return create_model("davit_tiny", **{**SMALL, **options}).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, **({"num_classes": 0} if name.endswith("_fl") else {}))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", [(64, 64), (75, 62), (3, 130)])
@pytest.mark.parametrize("extra", [{}, {"down_kernel_size": 3, "channel_attn_v2": True}])
def test_timm_computes_the_same_with_the_same_weights(size: tuple[int, int], extra: dict) -> None:
    renamed = {"channel_attn_v2": "channel_flavour"}
    ours = _small(**{renamed.get(name, name): "v2" if value is True else value for name, value in extra.items()})
    theirs = timm.create_model("davit_tiny", **SMALL, **extra).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
        load_checkpoint(ours, theirs.state_dict(), checkpoint_filter_fn)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_davit_tiny_equals_timms() -> None:
    theirs = timm.create_model("davit_tiny").eval()
    ours = create_model("davit_tiny").eval()
    load_checkpoint(ours, theirs.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 96, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def _official(key: str) -> str:
    for pattern, name in (
        (r"^stem\.", "patch_embeds.0."),
        (r"^stages\.(\d+)\.downsample\.", r"patch_embeds.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
        (r"^(patch_embeds\.\d+)\.conv\.", r"\1.proj."),
        (r"\.cpe([12])\.", lambda match: f".cpe.{int(match[1]) - 1}."),
        (r"^head\.fc\.", "head."),
        (r"^head\.norm\.", "norms."),
    ):
        key = re.sub(pattern, name, key)
    return key


def _florence(key: str) -> str:
    kind = "window" if re.search(r"blocks\.\d+\.0\.", key) else "channel"
    for pattern, name in (
        (r"^stem\.", "convs.0."),
        (r"^stages\.(\d+)\.downsample\.", r"convs.\1."),
        (r"^(convs\.\d+)\.conv\.", r"\1.proj."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.0\.", r"blocks.\1.\2.spatial_block."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.1\.", r"blocks.\1.\2.channel_block."),
        (r"\.cpe([12])\.proj\.", r".conv\1.fn.dw."),
        (r"\.norm1\.", f".{kind}_attn.norm."),
        (r"\.attn\.", f".{kind}_attn.fn."),
        (r"\.norm2\.", ".ffn.norm."),
        (r"\.mlp\.", ".ffn.fn.net."),
    ):
        key = re.sub(pattern, name, key)
    return f"vision_tower.{key}"


def test_the_authors_layout() -> None:
    source, target = _small(), _small()
    load_checkpoint(target, {_official(k): v for k, v in source.state_dict().items()}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_florence_2_in_the_authors_layout_with_its_language_model_aside() -> None:
    source, target = _small(num_classes=0), _small(num_classes=0)
    state = {_florence(key): value for key, value in source.state_dict().items() if not key.startswith("head")}
    load_checkpoint(target, {**state, "language_model.lm_head.weight": torch.ones(3)}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_a_florence_file_does_not_serve_a_classifier() -> None:
    model = _small()
    state = {_florence(key): value for key, value in model.state_dict().items() if not key.startswith("head")}
    with pytest.raises(CheckpointError, match=r"missing from the file: head\.norm\.weight") as caught:
        load_checkpoint(model, state, checkpoint_filter_fn)
    assert caught.value.missing == ("head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias")


def test_transformers_florence_tower_computes_the_same() -> None:
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    shape = {"embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4], "depths": [1, 2], "window_size": 4}
    patches = {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    tower = Florence2VisionBackbone(Florence2VisionConfig(**shape, **patches, drop_path_rate=0.0)).eval()
    ours = _small(num_classes=0, channel_flavour="v2", down_kernel_size=3)
    load_checkpoint(ours, {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}, checkpoint_filter_fn)
    x = torch.randn(1, 3, 52, 60)
    with torch.no_grad():
        theirs = tower(x)
        theirs = getattr(theirs, "last_hidden_state", theirs)
        torch.testing.assert_close(ours.forward_features(x), theirs, rtol=1e-4, atol=1e-5)


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source = _small()
    backbone = _small(num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


def test_features_only_loads_checkpoints(tmp_path) -> None:
    model = _small()
    torch.save({"state_dict": {_official(k): v for k, v in model.state_dict().items()}}, tmp_path / "davit.pth")
    net = create_model("davit_tiny", checkpoint=tmp_path / "davit.pth", features_only=True, **SMALL).eval()
    x = torch.randn(2, 3, 50, 33)
    for ours, expected in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, expected)
    assert net.feature_info.reduction() == [4, 8]


def test_intermediates_choose_stages() -> None:
    model = _small()
    x = torch.randn(1, 3, 40, 40)
    last, maps = model.forward_intermediates(x, indices=1)
    torch.testing.assert_close(maps, [last])
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert first.shape == (1, 16, 10, 10)
    with pytest.raises(ValueError, match="do not name stages"):
        model.forward_intermediates(x, indices=[2])


def test_dense_backbone_norms_every_map() -> None:
    model = _small()
    dense = DaViTDense(model, out_indices=(1,))
    x = torch.randn(1, 3, 40, 40)
    expected = dense.norm1(model.forward_features(x))
    torch.testing.assert_close(dense(x), [expected])
    assert [name for name in dense.state_dict() if "head" in name] == []


@pytest.mark.parametrize("kinds", [("spatial",), ("channel",), ("channel", "spatial")])
def test_attention_types_choose_the_sub_blocks(kinds: tuple[str, ...]) -> None:
    model = _small(attention_types=kinds)
    names = {"spatial": "WindowAttention", "channel": "ChannelAttention"}
    found = [type(sub_block.attn).__name__ for sub_block in model.stages[1].blocks[0]]
    assert found == [names[kind] for kind in kinds]
    assert model(torch.randn(1, 3, 33, 20)).shape == (1, 7)


def test_drop_path_rises_over_all_sub_blocks() -> None:
    model = _small(drop_path_rate=0.5)
    rates = [getattr(m.drop_path1, "drop_prob", 0.0) for s in model.stages for b in s.blocks for m in b]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


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
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 32)


def test_export_survives_a_free_batch(compiling: None) -> None:
    model = _small()
    x = torch.randn(2, 3, 44, 36)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 3, 44, 36)
    torch.testing.assert_close(program.module()(more), model(more))


def test_compiles_whole(compiling: None) -> None:
    model = _small(depths=(1,), embed_dims=(8,), num_heads=(2,))
    x = torch.randn(1, 3, 44, 36)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_bfloat16_autocast_stays_close() -> None:
    model = _small()
    x = torch.randn(1, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, "differ in length"),
        ({"num_heads": (3, 4)}, "dim=16 is not a multiple of heads=3"),
        ({"attention_types": ("spatial", "chanel")}, "'chanel' is not one of 'spatial', 'channel'"),
        ({"attention_types": ()}, "must be a sequence of"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(shape))
