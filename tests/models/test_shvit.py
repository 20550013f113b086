"""SHViT: published sizes, both checkpoint layouts, timm as oracle, fusing, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.vision.shvit import SHViT, checkpoint_filter_fn

SMALL = {"depths": (1, 2), "embed_dims": (16, 24), "partial_dims": (4, 6), "qk_dims": (4, 8), "types": "is"}
THEIRS = {"depth": (1, 2), "embed_dim": (16, 24), "partial_dim": (4, 6), "qk_dim": (4, 8), "types": ("i", "s")}
PARAMETERS = {"shvit_s1": 6_330_808, "shvit_s2": 11_483_072, "shvit_s3": 14_245_273, "shvit_s4": 16_588_484}


def _small(**options) -> SHViT:
    return create_model("shvit_s1", **{**SMALL, "num_classes": 7, **options}).eval()


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                positive = "var" in name or "bn.weight" in name
                tensor.add_(0.3 * torch.rand_like(tensor) if positive else 0.1 * torch.randn_like(tensor))
    return model


def _official(key: str) -> str:
    """timm's name of a tensor in the authors' layout."""
    key = re.sub(r"^stages\.0\.blocks\.", "blocks1.", key)
    key = re.sub(r"^stages\.(\d)\.blocks\.(\d+)", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.([01])", lambda m: f"blocks{int(m[1]) + 1}.0.{m[2]}", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.2", lambda m: f"blocks{int(m[1]) + 1}.1", key)
    return re.sub(r"^stages\.(\d)\.downsample\.([34])", lambda m: f"blocks{int(m[1]) + 1}.2.{int(m[2]) - 3}", key)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", [(64, 64), (112, 75)])
@pytest.mark.parametrize("layout", ["timm", "official", "flat"])
def test_timm_computes_the_same_with_the_same_weights(size: tuple[int, int], layout: str) -> None:
    theirs = _shaken(timm.create_model("shvit_s1", num_classes=7, **THEIRS)).eval()
    state = theirs.state_dict()
    if layout != "timm":
        state = {"model": {_official(key): value for key, value in state.items()}}
    if layout == "flat":
        state["model"] = {
            k: v[..., 0, 0] if v.shape[2:] == (1, 1) and ".c." in k else v for k, v in state["model"].items()
        }
    ours = _small()
    load_checkpoint(ours, state, checkpoint_filter_fn)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.fuse()(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_match_timms() -> None:
    theirs, ours = _shaken(timm.create_model("shvit_s1", num_classes=7, **THEIRS)).double(), _small().double()
    load_checkpoint(ours, theirs.state_dict(), checkpoint_filter_fn)
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    for model in (ours.train(), theirs.train()):
        model(x).square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_fusing_leaves_no_norm_and_files_do_not_mix() -> None:
    model = _shaken(_small())
    fused = _small()
    load_checkpoint(fused, model.state_dict(), checkpoint_filter_fn)
    fused.fuse()
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)) for m in fused.modules())
    with pytest.raises(CheckpointError, match="holds a fused SHViT"):
        load_checkpoint(model, fused.state_dict(), checkpoint_filter_fn)
    again = _small().fuse()
    load_checkpoint(again, fused.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    assert again.get_classifier().out_features == 7


def test_distillation_has_two_heads() -> None:
    model = _shaken(_small(distillation=True))
    x = torch.randn(2, 3, 64, 64)
    last = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model(x), (model.head(last) + model.head_dist(last)) / 2)
    logits, taught = model.train()(x)
    assert logits.shape == taught.shape == (2, 7)
    plain = _small()
    load_checkpoint(plain, model.state_dict(), checkpoint_filter_fn)


def test_residual_branches_start_as_nothing() -> None:
    block = _small().stages[1].blocks[0]
    x = torch.randn(1, 24, 3, 3)
    torch.testing.assert_close(block(x), x)


def test_drop_path_rises_over_the_blocks() -> None:
    model = _small(drop_path_rate=0.4)
    rates = [getattr(b.ffn.drop_path, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_more_heads_are_an_option() -> None:
    attention = _small(heads=2).stages[1].blocks[0].mixer.m
    assert attention.heads == 2


def test_small_images_warn() -> None:
    with pytest.warns(UserWarning, match="32 x 70 pixels leaves a single position"):
        _small()(torch.randn(1, 3, 32, 70))


def test_features_only_loads_checkpoints(tmp_path) -> None:
    model = _shaken(_small())
    torch.save({"model": {_official(k): v for k, v in model.state_dict().items()}}, tmp_path / "shvit.pth")
    net = create_model("shvit_s1", checkpoint=tmp_path / "shvit.pth", features_only=True, num_classes=7, **SMALL).eval()
    x = torch.randn(2, 3, 80, 64)
    for ours, expected in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, expected)
    assert net.feature_info.reduction() == [16, 32]


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source, backbone = _shaken(_small()), _small(num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _shaken(_small()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.randn(2, 3, 64, 64)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 24)


def test_export_survives_a_free_batch(compiling: None) -> None:
    model = _small()
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        more = torch.randn(5, 3, 64, 80)
        torch.testing.assert_close(program.module()(more), model(more))


def test_compiles_whole(compiling: None) -> None:
    model = _small(depths=(1, 1))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_bfloat16_autocast_stays_close() -> None:
    model = _small()
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, "differ in length"),
        ({"types": ("i", "x")}, "'x' is not one of 'i', 's'"),
        ({"partial_dims": (4, 30)}, "must lie between 1"),
        ({"embed_dims": (12, 24)}, "multiple of 8"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(shape))
