"""DependencyViT: sizes, dynamic pooling, what it records, the published layout, what timm expects of a model."""

from __future__ import annotations

import pytest
import torch

from manyheads.models import create_model, load_checkpoint
from manyheads.models.recipes import recipe_for
from manyheads.models.vision.dependency import DependencyViT, KeepTokens, checkpoint_filter_fn

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 7}
LITE = {**SMALL, "prune_layers": (1, 2), "prune_ratio": 0.25}
PARAMETERS = {
    "dependency_vit_tiny": 5_929_000,
    "dependency_vit_small": 22_916_200,
    "dependency_vit_lite_tiny": 5_929_000,
}


def _small(**options) -> DependencyViT:
    return create_model("dependency_vit_tiny", **{**SMALL, "init_values": 1.0, **options}).eval()


def _lite(**options) -> DependencyViT:
    return _small(**{**LITE, **options})


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_wider_controller_comes_closer_to_the_published_size() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in create_model(name, message_hidden_ratio=1).parameters())
            for name in ("dependency_vit_tiny", "dependency_vit_small")
        ]
    assert [round(size / 1e6, 2) for size in sizes] == [6.15, 23.8]


def test_the_lite_model_keeps_the_published_numbers_of_tokens() -> None:
    with torch.device("meta"):
        blocks = create_model("dependency_vit_lite_tiny").stages[0].blocks
    counts, tokens = [], 196
    for number, block in enumerate(blocks):
        assert (block.keep is not None) == (number in (2, 5, 8, 11))
        if block.keep is not None:
            tokens = block.keep.count(tokens)
            counts.append(tokens)
    assert counts == [164, 132, 100, 69]


def test_the_tokens_with_the_largest_messages_stay() -> None:
    message = torch.tensor([[0.1, 0.5, 0.3, 0.9], [0.4, 0.3, 0.2, 0.1]])
    assert KeepTokens(0.5)(message).tolist() == [[3, 1], [0, 1]]
    assert KeepTokens(0.1)(message).shape == (2, 1)


def test_dynamic_pooling_drops_tokens_in_the_middle_of_a_block() -> None:
    model, x = _lite(), torch.randn(2, 3, 32, 32)
    blocks = model.stages[0].blocks
    seen = {}
    for index, block in enumerate(blocks):
        block.attn.register_forward_hook(lambda m, a, y, i=index: seen.update({f"attn{i}": a[0].shape[1]}))
        block.mlp.register_forward_hook(lambda m, a, y, i=index: seen.update({f"mlp{i}": a[0].shape[1]}))
    model(x)
    assert seen == {"attn0": 16, "mlp0": 16, "attn1": 16, "mlp1": 12, "attn2": 12, "mlp2": 8}
    maps = model.forward_features(x)
    assert (maps.abs().sum(-1) > 0).sum((1, 2)).tolist() == [8, 8]
    torch.testing.assert_close(model(x), model.head(maps.sum((1, 2)) / 8))


def test_without_ratio_nothing_changes() -> None:
    model, lite, x = _small(), _lite(prune_ratio=0), torch.randn(2, 3, 32, 32)
    lite.load_state_dict(model.state_dict())
    torch.testing.assert_close(lite(x), model(x))


def test_records_are_those_of_a_run() -> None:
    model, x = _lite(), torch.randn(2, 3, 32, 32)
    found = model.dependencies(x)
    torch.testing.assert_close(found.logits, model(x))
    assert [tuple(mask.shape) for mask in found.masks] == [(2, 16, 16), (2, 16, 16), (2, 12, 12)]
    assert found.grid == (4, 4)
    assert found.message.shape == (2, 8)
    for mask, message, places in zip(found.masks, found.messages, found.places):
        torch.testing.assert_close(mask.sum(1), message)
        assert places.shape == message.shape
    kept = found.messages[1].topk(12).indices
    assert found.places[2].equal(found.places[1].gather(1, kept))
    later = found.messages[1].gather(1, kept)
    assert (found.messages[2] < later).all()


def test_the_layout_of_the_pull_request() -> None:
    source, target = _small(), _small()
    state = {
        key.replace("stages.0.blocks.", "blocks.").replace("patch_embed.", "patch_embed.proj."): value
        for key, value in source.state_dict().items()
    }
    expected = {"patch_embed.proj.weight", "blocks.0.peg.proj.bias", "blocks.2.ls1.gamma", "blocks.1.mlp.fc2.bias"}
    expected |= {"blocks.0.attn.head_selector.weight", "blocks.0.attn.message_controller.fc1.weight", "head.weight"}
    assert expected <= set(state)
    load_checkpoint(target, {"state_dict": state}, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    load_checkpoint(_small(num_classes=0), state, checkpoint_filter_fn)


def test_oblong_images() -> None:
    model, x = _small(pos_embed=True, img_size=(32, 48)), torch.randn(2, 3, 32, 48)
    assert model.grid == (4, 6)
    assert model.pos_embed.shape == (1, 24, 24)
    assert model.forward_features(x).shape == (2, 4, 6, 24)


def test_position_embeddings_follow_the_image() -> None:
    source, target = _small(pos_embed=True), _small(pos_embed=True, img_size=48)
    load_checkpoint(target, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(target(x), source(x))
    assert source.no_weight_decay() == {"pos_embed"}
    assert _small().no_weight_decay() == set()


@pytest.mark.parametrize("make", [_small, _lite])
def test_features_only(make, tmp_path) -> None:
    model, x = make(), torch.randn(1, 3, 32, 40)
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    options = {**SMALL, "init_values": 1.0} | (LITE if make is _lite else {})
    net = create_model("dependency_vit_tiny", checkpoint=tmp_path / "file.pth", features_only=True, **options).eval()
    (features,) = net(x)
    assert features.shape == (1, 24, 4, 5)
    torch.testing.assert_close([features], model.forward_intermediates(x, intermediates_only=True))
    (normed,) = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed.permute(0, 2, 3, 1), model.forward_features(x))


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model, x = _lite().train(), torch.randn(2, 3, 32, 32)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch.testing.assert_close(plain, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 24)


def test_layer_scales_begin_where_told() -> None:
    with torch.device("meta"):
        assert create_model("dependency_vit_tiny").stages[0].blocks[0].ls1.gamma.shape == (192,)
    assert not [name for name in _small(init_values=0).state_dict() if "gamma" in name]
    model = _small(message_bias=3.0)
    assert model.stages[0].blocks[0].attn.message_controller.fc2.bias.tolist() == [3.0]


@pytest.mark.parametrize("make", [_small, _lite])
def test_export_survives_a_free_batch_and_compile(compiling: None, make) -> None:
    model, x = make(), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(more), model(more))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_bfloat16_stays_close() -> None:
    model, x = _small(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
        assert _lite()(x).isfinite().all()
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_recipe_and_preprocessing() -> None:
    recipe = recipe_for("dependency_vit_small")
    assert (recipe.epochs, recipe.weight_decay, recipe.crop_pct) == (300, 0.05, 0.9)
    with torch.device("meta"):
        config = create_model("dependency_vit_small").pretrained_cfg
    assert (config["mean"], config["std"], config["crop_pct"]) == ((0.5,) * 3, (0.5,) * 3, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _small(num_heads=5), "dim=24 is not a multiple of heads=5"),
        (lambda: _small(img_size=30), "img_size=30 must be a multiple"),
        (lambda: _lite(prune_layers=(1, 3)), "names blocks that a model of depth=3 does not have"),
        (lambda: _lite(prune_layers=(0, 1)), "block 0 would drop tokens before a position generator"),
        (lambda: _lite(prune_ratio=0.5), "prune_ratio=0.5 at 2 blocks must be"),
        (lambda: _lite(prune_layers=(2, 2), prune_ratio=1), "prune_ratio=1 at 1 blocks"),
        (lambda: _small(head_selector_temperature=-1), "temperature=-1"),
        (lambda: _small()(torch.randn(1, 3, 36, 32)), "not made of patches of 8"),
        (lambda: _small()(torch.randn(1, 4, 32, 32)), "image must be"),
        (lambda: _small().dependencies(torch.randn(4, 32, 32)), "image must be"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
