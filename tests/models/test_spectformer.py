"""SpectFormer: published sizes, the authors' layouts, other image sizes, what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import torch

from manyheads.layers.spectral import ClassAttention, FullAttention, SpectralGating
from manyheads.models import create_model, load_checkpoint
from manyheads.models.recipes import recipe_for
from manyheads.models.vision import spectformer, spectformer_pyramid
from manyheads.objectives.token_label import mix_tokens, token_label_loss, unmix_tokens

VANILLA = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "alpha": 1, "num_classes": 7}
PYRAMID = {
    "img_size": 32,
    "stem_hidden_dim": 8,
    "embed_dims": (8, 16),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "mixers": ("spectral", "attention"),
    "num_classes": 7,
}
SMALL = {
    "spectformer_vanilla_xs": {**VANILLA, "drop_path_rate": 0.0},
    "spectformer_s": {**PYRAMID, "drop_path_rate": 0.0},
}
CONVERT = {
    "spectformer_vanilla_xs": spectformer.checkpoint_filter_fn,
    "spectformer_s": spectformer_pyramid.checkpoint_filter_fn,
}
PARAMETERS = {
    "spectformer_vanilla_ti": 9_158_376,
    "spectformer_vanilla_xs": 20_028_520,
    "spectformer_vanilla_s": 32_449_768,
    "spectformer_vanilla_b": 57_159_656,
    "spectformer_s": 22_226_928,
    "spectformer_b": 33_052_880,
    "spectformer_l": 54_675_792,
}
NAMES = list(SMALL)


def _small(name: str, **options) -> torch.nn.Module:
    return create_model(name, **{**SMALL[name], **options}).eval()


def _official(state: dict, stages: int = 2) -> dict:
    named = {}
    for key, value in state.items():
        for pattern, name in (
            (r"^patch_embed\.", "patch_embed.proj."),
            (r"^stages\.0\.blocks\.(\d+\.(norm|filter|attn\.qkv|attn\.proj|mlp)\S*)$", r"blocks.\1")
            if "pos_embed" in state
            else (r"^stages\.(\d+)\.blocks\.", lambda match: f"block{int(match[1]) + 1}."),
            (r"^stages\.(\d+)\.(patch_embed|norm)\.", lambda match: f"{match[2]}{int(match[1]) + 1}."),
            (r"^class_block\.", "post_network.0."),
            (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
        ):
            key = re.sub(pattern, name, key)
        if key.startswith("norm.") and "pos_embed" not in state:
            key = key.replace("norm.", f"norm{stages}.")
        named[key] = value
    return named


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_images_need_not_be_square(name: str) -> None:
    wide, flexible = _small(name, img_size=(32, 48)), _small(name, resize=True)
    load_checkpoint(wide, flexible.state_dict(), CONVERT[name])
    x = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(wide(x), flexible(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_epsilon_is_that_of_all_norms_but_the_embeddings(name: str) -> None:
    norms = {
        name: m.eps for name, m in _small(name, norm_eps=1e-3).named_modules() if isinstance(m, torch.nn.LayerNorm)
    }
    embedding = {name: eps for name, eps in norms.items() if "patch_embed" in name}
    assert set(embedding.values()) <= {1e-5}
    assert {eps for name, eps in norms.items() if name not in embedding} == {1e-3}


@pytest.mark.parametrize(
    ("name", "size"), [("spectformer_s", 21_777_928), ("spectformer_b", 32_539_880), ("spectformer_l", 54_162_792)]
)
def test_sizes_without_token_labels(name: str, size: int) -> None:
    with torch.device("meta"):
        model = create_model(name, token_label=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_first_blocks_are_spectral() -> None:
    kinds = [type(block).__name__ for block in _small("spectformer_vanilla_xs").stages[0].blocks]
    assert kinds == ["SpectralBlock", "AttentionBlock", "AttentionBlock"]
    swapped = _small("spectformer_vanilla_xs", order="attention_first").stages[0].blocks
    assert [type(block).__name__ for block in swapped] == ["AttentionBlock", "AttentionBlock", "SpectralBlock"]
    with torch.device("meta"):
        stages = create_model("spectformer_s").stages
    assert [stage.blocks[0].attn.complex_weight.shape[:2] for stage in stages[:2]] == [(56, 29), (28, 15)]
    assert {type(stage.blocks[0].attn).__name__ for stage in stages[2:]} == {"FullAttention"}


@pytest.mark.parametrize("name", NAMES)
def test_the_authors_layout(name: str) -> None:
    source, target = _small(name), _small(name)
    state = _official(source.state_dict())
    expected = {"blocks.0.filter.complex_weight", "blocks.1.attn.qkv.weight", "patch_embed.proj.bias", "norm.weight"}
    if name == "spectformer_s":
        expected = {"block1.0.attn.complex_weight", "patch_embed1.conv.0.weight", "norm2.bias", "block2.0.attn.kv.bias"}
        expected |= {"post_network.0.attn.q.weight", "aux_head.weight", "block1.0.mlp.dwconv.dwconv.weight"}
    assert expected <= set(state)
    load_checkpoint(target, {"state_dict": state, "epoch": 3}, CONVERT[name])
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_image_size_is_resized_as_a_call_would(name: str) -> None:
    source, target = _small(name, resize=True), _small(name, img_size=48)
    load_checkpoint(target, source.state_dict(), CONVERT[name])
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="allow resize"):
        target(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_can_be_set_to_another_image_size(name: str) -> None:
    flexible, fixed = _small(name, resize=True), _small(name)
    fixed.load_state_dict(flexible.state_dict())
    fixed.set_input_size((48, 40))
    # The trainer's files hold contiguous tensors only.
    assert all(parameter.is_contiguous() for parameter in fixed.parameters())
    x = torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(fixed(x), flexible(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="allow resize"):
        fixed(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_leaves_the_classifiers_of_a_file_aside(name: str) -> None:
    source, backbone = _small(name), _small(name, num_classes=0)
    load_checkpoint(backbone, source.state_dict(), CONVERT[name])
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


def test_token_labels_add_half_of_the_largest_dense_logits() -> None:
    model, x = _small("spectformer_s"), torch.randn(2, 3, 32, 32)
    label, dense = model.forward_dense(x)
    assert dense.shape == (2, 16, 7)
    torch.testing.assert_close(model(x), label + 0.5 * dense.max(1).values)
    plain = _small("spectformer_s", token_label=False)
    load_checkpoint(plain, model.state_dict(), spectformer_pyramid.checkpoint_filter_fn)
    torch.testing.assert_close(plain(x), label)
    with pytest.raises(ValueError, match="token_label=True"):
        plain.forward_dense(x)


def test_images_are_mixed_after_the_stem_and_dense_logits_put_back(monkeypatch) -> None:
    model, x = _small("spectformer_s"), torch.randn(2, 3, 32, 32)
    label, dense = model.forward_dense(x)
    # A box as large as the map swaps the images for good.
    monkeypatch.setattr(spectformer_pyramid, "mix_tokens", lambda maps, **options: (maps.flip(0), (0, 0, 4, 4)))
    mixed_label, mixed_dense, box = model.forward_mixed(x)
    torch.testing.assert_close((mixed_label, mixed_dense), (label.flip(0), dense))
    assert token_label_loss(mixed_label, mixed_dense, torch.rand(2, 7, 18), box=box).isfinite()


def test_mixed_training_steps_reach_every_parameter() -> None:
    model, x = _small("spectformer_s").train(), torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
    label, dense, box = model.forward_mixed(x, generator=torch.Generator().manual_seed(3))
    assert (box[2] - box[0]) * (box[3] - box[1]) > 0
    token_label_loss(label, dense, torch.rand(2, 7, 18), box=box).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # Of equal images, mixing takes nothing away.
    model.eval()
    torch.testing.assert_close(model.forward_mixed(x)[:2], model.forward_dense(x))
    with pytest.raises(ValueError, match="token_label=True"):
        _small("spectformer_s", token_label=False).forward_mixed(x)


def test_an_extra_layer_before_the_classifier() -> None:
    model = _small("spectformer_vanilla_xs", representation_size=5)
    x = torch.randn(2, 3, 32, 32)
    pooled = model.forward_features(x).mean((1, 2))
    torch.testing.assert_close(model(x), model.head(torch.tanh(model.pre_logits[0](pooled))))


def test_features_only(tmp_path) -> None:
    for name, shapes in (
        ("spectformer_vanilla_xs", [(1, 24, 8, 8)]),
        ("spectformer_s", [(1, 8, 8, 8), (1, 16, 4, 4)]),
    ):
        model = _small(name)
        torch.save({"model": _official(model.state_dict())}, tmp_path / "file.pth")
        net = create_model(name, checkpoint=tmp_path / "file.pth", features_only=True, **SMALL[name]).eval()
        x = torch.randn(1, 3, 32, 32)
        maps = net(x)
        assert [tuple(y.shape) for y in maps] == shapes
        torch.testing.assert_close(maps, model.forward_intermediates(x, intermediates_only=True))


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_activations_gives_the_same_gradients(name: str) -> None:
    model = _small(name).train()
    x = torch.randn(2, 3, 32, 32)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch.testing.assert_close(plain, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("name", NAMES)
def test_classifier_can_be_replaced_and_other_channels_read(name: str) -> None:
    model = _small(name, in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_export_survives_a_free_batch(compiling: None, name: str) -> None:
    model, x = _small(name), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_close(name: str) -> None:
    model, x = _small(name), torch.randn(1, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_recipes_are_the_published_ones() -> None:
    vanilla, pyramid = recipe_for("spectformer_vanilla_b"), recipe_for("spectformer_l")
    assert (vanilla.epochs, vanilla.drop_path, vanilla.random_erasing, vanilla.clip_grad) == (330, 0.25, 0.0, 1.0)
    assert (pyramid.epochs, pyramid.drop_path, pyramid.random_erasing, pyramid.clip_grad) == (310, 0.3, 0.25, 1.0)
    assert recipe_for("spectformer_s").clip_grad == 0.0


def test_class_attention_reads_itself_too() -> None:
    layer, x = ClassAttention(4, 2).double(), torch.randn(2, 5, 4, dtype=torch.double)
    k, v = layer.kv(x).chunk(2, -1)
    out = []
    for head in (slice(0, 2), slice(2, 4)):
        weights = (layer.q(x[:, :1])[..., head] @ k[..., head].mT * 2**-0.5).softmax(-1)
        out.append(weights @ v[..., head])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(out, -1)))


def test_fused_and_separate_projections_agree() -> None:
    fused, separate = FullAttention(8, 2, fused=True), FullAttention(8, 2, fused=False)
    weight, bias = fused.qkv.weight, fused.qkv.bias
    state = {"q.weight": weight[:8], "q.bias": bias[:8], "kv.weight": weight[8:], "kv.bias": bias[8:]}
    separate.load_state_dict(state | {f"proj.{name}": value for name, value in fused.proj.state_dict().items()})
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(fused(x), separate(x))


def test_mixed_tokens_come_back_where_they_were() -> None:
    maps = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 16, 16, 1)
    generator = torch.Generator().manual_seed(3)
    mixed, box = mix_tokens(maps, cell=8, generator=generator)
    x1, y1, x2, y2 = box
    assert mixed[0].sum() == 64 * (x2 - x1) * (y2 - y1)
    dense = mixed[:, ::8, ::8].flatten(1, 2)
    assert unmix_tokens(dense, box, (2, 2)).eq(torch.arange(2.0).view(2, 1, 1)).all()


def test_token_label_loss_is_the_sum_of_both() -> None:
    label, dense = torch.randn(2, 3), torch.randn(2, 4, 3)
    target = torch.rand(2, 3, 6).softmax(1)
    cross = -(target[..., 1] * label.log_softmax(1)).sum(1).mean()
    tokens = -(target[..., 2:].mT * dense.log_softmax(2)).sum(2).mean()
    torch.testing.assert_close(token_label_loss(label, dense, target), cross + 0.5 * tokens)
    quarter = 0.75 * target[..., 1] + 0.25 * target.flip(0)[..., 1]
    mixed = -(quarter * label.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(token_label_loss(label, dense, target, box=(0, 0, 1, 1)), mixed + 0.5 * tokens)
    with pytest.raises(ValueError, match="4 tokens"):
        token_label_loss(label, dense, target[..., :4])


def test_ground_truth_is_mixed_in_more_where_the_annotator_agrees() -> None:
    target = torch.zeros(2, 2, 3)
    target[:, 0, 0] = 1  # the truth is class 0
    target[0, 0, 1] = target[1, 1, 1] = target[:, 0, 2] = 1  # the annotator agrees on the first image only
    label, dense = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 1, 2)
    log = label.log_softmax(1)
    wanted = torch.tensor([[1.0, 0.0], [0.1, 0.9]])
    expected = -(wanted * log).sum(1).mean() + 0.5 * torch.tensor(2.0).log()
    torch.testing.assert_close(token_label_loss(label, dense, target, ground_truth=True), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _small("spectformer_vanilla_xs", num_heads=5), "dim=24 is not a multiple of heads=5"),
        (lambda: _small("spectformer_vanilla_xs", alpha=4), "alpha=4 spectral blocks must be between 0 and depth=3"),
        (lambda: _small("spectformer_vanilla_xs", img_size=30), "img_size=30 must be a multiple of patch_size=4"),
        (lambda: _small("spectformer_vanilla_xs", order="mixed"), "order='mixed'"),
        (lambda: _small("spectformer_s", depths=(1,)), "differ in length"),
        (lambda: _small("spectformer_s", mixers=("spectral", "wavelet")), "mixers='wavelet'"),
        (lambda: _small("spectformer_s")(torch.randn(1, 3, 40, 40)), "maps of 8 x 8, got 10 x 10"),
        (lambda: _small("spectformer_s")(torch.randn(1, 4, 32, 32)), "image must be"),
        (lambda: SpectralGating(4, (0, 2)), "must be positive"),
        (lambda: SpectralGating(4, (3, 2))(torch.randn(1, 3, 2, 5)), r"x must be \(batch, 3, 2, 4\)"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
