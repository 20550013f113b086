"""DualToken-ViT: sizes, merging, the key layout, odd images, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from manyheads.models import create_model, load_checkpoint
from manyheads.models.recipes import recipe_for
from manyheads.models.vision.dualtoken import DualTokenViT, Merge, checkpoint_filter_fn

SMALL = {"embed_dims": (8, 12, 16), "depths": (1, 2, 1), "num_heads": (2, 2, 4), "token_size": 3, "num_classes": 7}
PARAMETERS = {
    "dualtoken_vit_t": 5_896_303,
    "dualtoken_vit_s": 11_754_930,
    "dualtoken_vit_s_normal": 12_222_774,
}


def _small(**options) -> DualTokenViT:
    return create_model("dualtoken_vit_s", **{**SMALL, **options}).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "operations"), [("dualtoken_vit_t", 0.48e9), ("dualtoken_vit_s", 0.92e9)])
def test_published_operations(name: str, operations: float) -> None:
    with torch.device("meta"):
        model, x = create_model(name).eval(), torch.randn(1, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with counter:
        model(x)
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    # Without attention's own products, as the published figures count; somewhat less, because the 1x1
    # convolutions of the halving steps follow the mean.
    linear = sum(found[f"aten.{name}"] for name in ("convolution", "addmm", "mm")) / 2
    assert 0.97 * operations < linear <= operations


def test_four_positions_become_one() -> None:
    merge, x, tokens = Merge(2, 3), torch.randn(1, 3, 4, 2), torch.randn(1, 4, 2)
    merged, small = merge(x, tokens)
    assert merged.shape == (1, 2, 2, 3)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    for i, j in ((0, 1), (1, 0)):
        four = [padded[0, 2 * i + r, 2 * j + c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
        wanted = merge.reduction(merge.norm(torch.cat(four))) + merge.res_proj(torch.stack(four).amax(0))
        torch.testing.assert_close(merged[0, i, j], wanted)
    torch.testing.assert_close(small, merge.proj(merge.norm2(tokens)))


def test_tokens_carry_the_image_everywhere() -> None:
    model = _small(depths=(1, 1, 1), steps=(1, 1, 0)).double()
    x = torch.randn(1, 3, 256, 256, dtype=torch.double, requires_grad=True)
    # One position of the first map: convolutions reach 7 of its cells, the tokens all of it.
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0]
    reached = torch.autograd.grad(first[0, :, 0, 0].sum(), x)[0].abs().sum(1)[0] > 0
    assert reached[-64:, -64:].any()


def test_the_published_key_layout() -> None:
    source, target = _small(), _small()
    state = {}
    for key, value in source.state_dict().items():
        merge = re.fullmatch(r"stages\.(\d)\.merge\.(.*)", key)
        key = f"merges.{int(merge[1]) - 1}.{merge[2]}" if merge else re.sub(r"^(stages\.\d\.)blocks\.", r"\1", key)
        key = key.replace("conv_encoder.conv_dw", "conv_encoder.dwconv")
        state[re.sub(r"conv_encoder\.mlp\.fc(\d)", r"conv_encoder.pw\1", key)] = value
    expected = {
        "merges.1.res_proj.weight",
        "stages.1.1.conv_encoder.pw2.bias",
        "stages.0.0.token_module.down.1.pw.bias",
    }
    expected |= {"patch_embed.stem.10.running_var", "stages.2.0.bi_attn.spatial_select.weight", "global_token"}
    assert expected <= set(state)
    load_checkpoint(target, {"state_dict": state}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    load_checkpoint(target, source.state_dict(), checkpoint_filter_fn)
    load_checkpoint(_small(num_classes=0), state, checkpoint_filter_fn)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 70)])
def test_any_size_from_32_pixels(size: tuple[int, int]) -> None:
    features, tokens = _small().forward_tokens(torch.randn(2, 3, *size))
    assert features.shape == (2, -(-size[0] // 32), -(-size[1] // 32), 16)
    assert tokens.shape == (2, 9, 16)


def test_features_only(tmp_path) -> None:
    model, x = _small(), torch.randn(1, 3, 64, 96)
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    net = create_model("dualtoken_vit_s", checkpoint=tmp_path / "file.pth", features_only=True, **SMALL).eval()
    maps = net(x)
    assert [tuple(y.shape) for y in maps] == [(1, 8, 8, 12), (1, 12, 4, 6), (1, 16, 2, 3)]
    torch.testing.assert_close(maps, model.forward_intermediates(x, intermediates_only=True))
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed.permute(0, 2, 3, 1), model.forward_features(x))
    torch.testing.assert_close(model.forward_tokens(x)[0], model.forward_features(x))


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model, x = _small().train(), torch.randn(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True)
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True)
    assert [name for (name, _), grad in zip(model.named_parameters(), plain) if grad is None] == []
    torch.testing.assert_close(plain, again)


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 16)
    assert model.no_weight_decay() == {"global_token"}


def test_export_survives_a_free_batch(compiling: None) -> None:
    model, x = _small(depths=(1, 1, 1), steps=(1, 0, 0)), torch.randn(2, 3, 33, 40)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 33, 40)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_close() -> None:
    model, x = _small(mlp="normal"), torch.randn(1, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
        assert model.forward_tokens(x)[1].dtype == torch.float32
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_the_recipe_is_the_published_one() -> None:
    recipe = recipe_for("dualtoken_vit_s")
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.drop_path) == (300, 20, 0.04, 0.1)
    assert (recipe.mixup, recipe.cutmix, recipe.random_erasing, recipe.color_jitter) == (0.2, 1.0, 0.25, 0.3)
    assert (recipe.lr, recipe.min_lr, recipe.warmup_lr) == (1e-3, 1e-6, 1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _small(num_heads=(3, 2, 4)), "dim=8 is not a multiple of heads=3"),
        (lambda: _small(depths=(1, 1)), "differ in length"),
        (lambda: _small(embed_dims=(9, 12, 16)), "must be even"),
        (lambda: _small(alpha=-0.1), "alpha=-0.1"),
        (lambda: _small(mlp="mlp"), "mlp='mlp'"),
        (lambda: _small()(torch.randn(1, 3, 31, 64)), "32 pixels a side"),
        (lambda: _small()(torch.randn(1, 4, 32, 32)), "image must be"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
