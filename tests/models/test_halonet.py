"""HaloNet: the paper's table, timm as oracle, any image size, what timm expects of a model."""

from __future__ import annotations

import pytest
import timm
import torch

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.vision.halonet import HaloNet, checkpoint_filter_fn

SMALL = {
    "patterns": ("b", "ba"), "embed_dims": (32, 64), "strides": (1, 2), "ratios": (0.5, 0.5), "heads": (2, 2),
    "block": 4, "halo": 1, "stem_width": 16, "num_classes": 7,
}  # fmt: skip
PARAMETERS = {
    "halonet_h0": 5_502_248,
    "halonet_h1": 8_101_352,
    "halonet_h2": 9_405_608,
    "halonet_h3": 11_842_792,
    "halonet_h4": 19_103_464,
    "halonet_h5": 30_718_952,
    "halonet_h6": 43_458_280,
    "halonet_h7": 67_434_728,
    "halonet_h1_timm": 8_100_056,
    "halonet26t": 12_480_288,
    "halonet50ts": 22_733_280,
    "sehalonet33ts": 13_691_712,
    "eca_halonext26ts": 10_756_885,
    "haloregnetz_b": 11_680_072,
    "lamhalobotnet50ts": 22_569_824,
    "halo2botnet50ts": 22_635_360,
}


def _small(**options) -> HaloNet:
    return create_model("halonet26t", **{**SMALL, **options}).eval()


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Norms away from their initial values, so that no branch is nothing."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model


LONG = ("halonet_h2", "halonet_h3", "halonet_h4", "halonet_h5", "halonet_h6", "halonet50ts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in PARAMETERS])
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["halonet26t", "eca_halonext26ts", "haloregnetz_b", "sehalonet33ts", "halonet50ts"])
def test_timm_computes_the_same_with_the_same_weights(name: str) -> None:
    theirs, ours = _shaken(timm.create_model(name, num_classes=7)).eval(), create_model(name, num_classes=7).eval()
    load_checkpoint(ours, theirs.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, *ours.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def _filled(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep what passes through them at its size, so that every branch counts in the result."""
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():
            (tensor.uniform_(0.8, 1.2) if name.endswith(("weight", "var")) else tensor.uniform_(-0.2, 0.2))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lamhalobotnet50ts", "halo2botnet50ts"])
def test_hybrids_compute_what_timm_does_and_take_their_image_size_only(name: str) -> None:
    theirs, ours = _filled(timm.create_model(f"{name}_256", num_classes=7)), create_model(name, num_classes=7).eval()
    load_checkpoint(ours, theirs.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="made for a map of 8 x 8 and got 6 x 8"):
            ours(torch.randn(1, 3, 192, 256))


def test_lambda_and_global_blocks_train() -> None:
    model = _small(patterns=("l", "g"), img_size=(32, 64), heads=(2, 4), lambda_window=3).train()
    model(torch.randn(2, 3, 32, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("stem", "pool", "reduction"), [("3x3", True, 4), ("3x3", False, 2), ("7x7", False, 2)])
def test_stems_with_and_without_pooling(stem: str, pool: bool, reduction: int) -> None:
    model = _small(stem=stem, stem_pool=pool)
    assert model.feature_info[0]["reduction"] == reduction
    first = model.forward_intermediates(torch.randn(1, 3, 32, 64), [0], intermediates_only=True)[0]
    assert first.shape[2:] == (32 // reduction, 64 // reduction)


def test_evaluation_crops_are_the_published_ones() -> None:
    for name in ("halonet26t", "eca_halonext26ts", "haloregnetz_b", "sehalonet33ts", "halonet50ts"):
        ours, theirs = timm.get_pretrained_cfg(f"manyheads_{name}"), timm.get_pretrained_cfg(name)
        assert (ours.crop_pct, ours.mean, ours.interpolation) == (theirs.crop_pct, theirs.mean, theirs.interpolation)


def test_timms_h1_has_its_own_name() -> None:
    with torch.device("meta"):
        theirs, ours = timm.create_model("halonet_h1"), create_model("halonet_h1_timm")
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_paper_family_has_wider_values() -> None:
    options = {"value_ratio": 2.5, "ratios": (0.5, 0.5), "patterns": ("a", "a"), "embed_dims": (32, 32)}
    attention = _small(**options).stages[1][0].self_attn
    assert attention.q.out_channels == 16
    assert attention.kv.out_channels == 16 + 40


@pytest.mark.parametrize("size", [(64, 32), (50, 33), (5, 9)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = _shaken(_small())
    first, second = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    assert second.shape[2:] == tuple(-(-side // 2) for side in first.shape[2:])


def test_padding_may_be_refused() -> None:
    model = _small(pad=False)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match="blocks of 4 need multiples of 32 pixels"):
        model(torch.randn(1, 3, 48, 64))


def test_files_of_other_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match="other shapes"):
        load_checkpoint(_small(), _small(halo=2).state_dict(), checkpoint_filter_fn)


def test_features_only_loads_checkpoints(tmp_path) -> None:
    model = _shaken(_small())
    torch.save(model.state_dict(), tmp_path / "halonet.pth")
    options = {**SMALL, "checkpoint": tmp_path / "halonet.pth", "out_indices": (0, 1)}
    net = create_model("halonet26t", features_only=True, **options).eval()
    x = torch.randn(2, 3, 50, 33)
    for ours, expected in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, expected)
    assert net.feature_info.reduction() == [4, 8]


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source, backbone = _shaken(_small(final_width=24)), _small(final_width=24, num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


def test_training_options() -> None:
    model = _shaken(_small(drop_path_rate=0.4)).train()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _shaken(_small()).train()
    x = torch.randn(2, 3, 32, 40)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 64)


def test_export_survives_a_free_batch(compiling: None) -> None:
    model = _shaken(_small(patterns=("b", "a")))
    x = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        more = torch.randn(5, 3, 32, 40)
        torch.testing.assert_close(program.module()(more), model(more))


def test_compiles_whole(compiling: None) -> None:
    model = _shaken(_small(patterns=("b", "a")))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_bfloat16_autocast_stays_close() -> None:
    model = _shaken(_small())
    x = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (1,)}, "differ in length"),
        ({"patterns": ("b", "bc")}, "'c' is not one of 'a', 'b', 'g', 'l'"),
        ({"stem": "deep"}, "stem='deep'"),
        ({"act": "gelu"}, "act='gelu'"),
        ({"channel_attention": "cbam"}, "channel_attention='cbam'"),
        ({"heads": (2, 3)}, "heads=3 must divide"),
        ({"heads": (2, 3), "patterns": ("b", "l")}, "heads=3 must divide"),
        ({"lambda_window": 4}, "lambda_window=4 must be odd"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(shape))
