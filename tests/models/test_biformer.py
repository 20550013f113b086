"""BiFormer models: published sizes, layouts, odd images, feature maps, export."""

from __future__ import annotations

import re

import pytest
import torch

from manyheads.models import CheckpointError, create_model, list_models, load_checkpoint
from manyheads.models.vision.biformer import VARIANTS, BiFormer, BiFormerDense, checkpoint_filter_fn

SMALL = {"depths": (1, 1), "embed_dims": (32, 64), "topks": (2, -2), "regions": 4, "num_classes": 5}
COUNTS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = BiFormer(**VARIANTS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    assert f"manyheads_{name}" in list_models("biformer*")


def test_every_image_size_gives_maps_of_the_usual_strides() -> None:
    backbone = create_model("biformer_tiny", features_only=True, **{**SMALL, "num_classes": 0}).eval()
    maps = backbone(torch.randn(1, 3, 53, 70))
    assert [tuple(x.shape) for x in maps] == [(1, 32, 14, 18), (1, 64, 7, 9)]
    strict = BiFormer(**SMALL, auto_pad=False)
    with pytest.raises(ValueError, match="auto_pad"):
        strict(torch.randn(1, 3, 53, 70))


def test_other_channels_and_classes() -> None:
    model = BiFormer(**SMALL, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 64)
    with pytest.raises(ValueError, match="image must be"):
        model(torch.randn(2, 3, 32, 32))


def _official(state: dict[str, torch.Tensor], nchw: bool) -> dict[str, torch.Tensor]:
    """Our state dict under the authors' names (two-stage models of the Swin-Tiny layout)."""
    names = [
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.mlp\.fc1", ".mlp.0"),
        (r"\.mlp\.fc2", ".mlp.2"),
    ]
    attention = [(r"^(stages\.0.*)\.attn\.qkv", r"\1.attn.qkv_linear"), (r"\.attn\.wo", ".attn.output_linear")]
    given = {}
    for key, value in state.items():
        for pattern, replacement in names + (
            attention if nchw else [(r"^(stages\.0.*)\.attn\.qkv", r"\1.attn.qkv.qkv")]
        ):
            key = re.sub(pattern, replacement, key)
        matrix = value.ndim == 2 and not key.startswith("head")
        given[key] = value[..., None, None] if nchw and matrix else value
    return given


@pytest.mark.parametrize("nchw", [False, True])
def test_swin_layout_checkpoints_come_back(nchw: bool) -> None:
    options = {**SMALL, "stem": "patch", "pos_embed": False, "formulation": "current" if nchw else "legacy"}
    model, other = BiFormer(**options), BiFormer(**options)
    load_checkpoint(other, {"model": _official(model.state_dict(), nchw)}, checkpoint_filter_fn)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))


def test_checkpoint_of_another_model_leaves_the_model_alone() -> None:
    model = BiFormer(**SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = BiFormer(**{**SMALL, "embed_dims": (32, 96)}).state_dict()
    with pytest.raises(CheckpointError, match="other shapes"):
        load_checkpoint(model, state, checkpoint_filter_fn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dense_form_norms_each_map() -> None:
    maps = BiFormerDense(BiFormer(**SMALL), (1,))(torch.randn(2, 3, 40, 48))
    assert [tuple(x.shape) for x in maps] == [(2, 64, 5, 6)]
    torch.testing.assert_close(maps[0].mean(1), torch.zeros(2, 5, 6), atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = BiFormer(**SMALL).train()
    x, grads = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_exports(compiling) -> None:
    model, x = BiFormer(**SMALL).eval(), torch.randn(1, 3, 40, 48)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_bad_options_name_themselves() -> None:
    for options, message in (
        ({"topks": (2, -3)}, "-1 and -2"),
        ({"depths": (1,)}, "depths="),
        ({"attention": "swin"}, "attention='swin'"),
        ({"stem": "vit"}, "stem='vit'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            BiFormer(**{**SMALL, **options})
