"""NAT and DiNAT: published sizes, checkpoint layouts, the blocks by hand, padding of small maps, what timm expects."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.vision.nat import NAT, FullAttention, PatchMerging, checkpoint_filter_fn

SMALL = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "kernel_size": 3, "num_classes": 7}
PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vit_rpb_small": 22_080_376,
    "vit_rpb_base": 86_627_080,
}


def _small(name: str = "nat_tiny", **options) -> NAT:
    return create_model(name, **{"dilations": [[1, 2], [1]], "layer_scale": 0.5, **SMALL, **options}).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_every_second_block_of_dinat_is_dilated() -> None:
    with torch.device("meta"):
        model = create_model("dinat_tiny")
    found = [[block.attn.dilation for block in level.blocks] for level in model.levels]
    assert found[:2] == [[1, 8, 1], [1, 4, 1, 4]]
    assert found[2] == [1, 2] * 9
    assert found[3] == [1] * 5


def test_a_block_is_attention_and_mlp_with_learnt_scales() -> None:
    block = _small().levels[0].blocks[1]
    x = torch.randn(2, 9, 8, 16)
    middle = x + block.gamma1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.gamma2 * block.mlp(block.norm2(middle)))


def test_small_maps_are_padded_before_the_projection() -> None:
    block = _small().levels[0].blocks[1]  # window 3, dilation 2: six tokens a side
    nn.init.normal_(block.attn.qkv.bias)
    x = torch.randn(1, 4, 7, 16)
    padded = F.pad(block.norm1(x), (0, 0, 0, 0, 0, 2))
    middle = x + block.gamma1 * block.attn(padded)[:, :4]
    torch.testing.assert_close(block(x), middle + block.gamma2 * block.mlp(block.norm2(middle)))


def test_without_the_padding_rule_small_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        _small(pad_small_maps=False)(torch.randn(1, 3, 16, 64))


def test_patch_merging_puts_the_token_below_before_the_token_to_the_right() -> None:
    merging = PatchMerging(1)
    seen = []
    merging.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    merging(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, ..., None])
    assert seen[0].tolist() == [[[[1, 4, 2, 5], [3, 6, 0, 0]]]]


def test_full_attention_biases_by_key_minus_query() -> None:
    layer = FullAttention(8, 2, side=3).double()
    x = torch.randn(1, 3, 3, 8, dtype=torch.double)
    q, k, v = layer.qkv(x).view(9, 3, 2, 4).unbind(1)
    out = torch.zeros(9, 2, 4, dtype=torch.double)
    for head in range(2):
        for i in range(9):
            bias = [layer.rpb[head, j // 3 - i // 3 + 2, j % 3 - i % 3 + 2] for j in range(9)]
            weights = (k[:, head] @ q[i, head] * 0.5 + torch.stack(bias)).softmax(0)
            out[i, head] = weights @ v[:, head]
    torch.testing.assert_close(layer(x), layer.proj(out.view(1, 3, 3, 8)))


def test_full_attention_says_which_image_size_it_wants() -> None:
    options = {"embed_dim": 16, "num_heads": (2,), "depths": (1,), "dilations": [[1]], "image_size": 64}
    model = create_model("vit_rpb_small", **options)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"4 x 4 tokens, got 5 x 4; create the model with the image_size"):
        model(torch.randn(1, 3, 80, 64))


def _hub(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        key = key.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        key = key.replace("patch_embed.norm.", "embeddings.norm.").replace(".blocks.", ".layers.")
        key = key.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        key = key.replace(".attn.rpb", ".attention.self.rpb").replace(".attn.proj.", ".attention.output.dense.")
        key = key.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        key = f"dinat.encoder.{key}" if key.startswith("levels") else key
        key = f"dinat.{key}" if key.startswith("embeddings") else key
        key = f"dinat.layernorm.{key[5:]}" if key.startswith("norm.") else key.replace("head.", "classifier.")
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace(".attn.qkv.", f".attention.self.{name}.")] = part
        elif key.endswith("gamma1"):
            renamed[key.replace("gamma1", "layer_scale_parameters")] = torch.stack([value, torch.zeros_like(value)])
        elif key.endswith("gamma2"):
            renamed[key.replace("gamma2", "layer_scale_parameters")][1] = value
        else:
            renamed[key] = value
    return renamed


def test_the_hub_layout_with_separate_projections() -> None:
    source, target = _small(), _small()
    state = _hub(source.state_dict())
    assert "dinat.encoder.levels.0.layers.1.attention.self.query.weight" in state
    load_checkpoint(target, state, checkpoint_filter_fn)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("dinat_s_tiny", lambda key: key.replace("levels.", "layers."), {"layer_scale": None}),
        ("nat_isotropic_small", lambda key: key.replace("levels.0.blocks.", "blocks."), {"depths": (2,)}),
        ("vit_rpb_small", lambda key: key.replace("levels.0.blocks.", "blocks."), {"depths": (2,)}),
    ],
)
def test_the_authors_layouts(name: str, theirs, options: dict) -> None:
    if "depths" in options:
        options = {**options, "num_heads": (2,), "dilations": [[1, 2]], "image_size": 48}
    source, target = _small(name, **options), _small(name, **options)
    state = {theirs(key): value for key, value in source.state_dict().items()}
    state["blocks.0.attn.relative_position_index"] = torch.zeros(9, 9)
    load_checkpoint(target, state, checkpoint_filter_fn)
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(source(x), target(x))


def test_a_missing_projection_is_named() -> None:
    model = _small()
    state = _hub(model.state_dict())
    del state["dinat.encoder.levels.0.layers.0.attention.self.key.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, state, checkpoint_filter_fn)
    assert caught.value.missing == ("levels.0.blocks.0.attn.qkv.weight",)


def test_another_window_resizes_the_bias_tables() -> None:
    source, target = _small(), _small(kernel_size=5)
    load_checkpoint(target, source.state_dict(), checkpoint_filter_fn)
    table, resized = source.levels[1].blocks[0].attn.rpb, target.levels[1].blocks[0].attn.rpb
    assert resized.shape == (4, 9, 9)
    torch.testing.assert_close(resized[:, 4, 4], table[:, 2, 2])


@pytest.mark.parametrize("options", [{}, {"out_indices": (0,)}])
def test_features_only_gives_the_maps_before_downsampling(tmp_path, options: dict) -> None:
    model = _small()
    torch.save(model.state_dict(), tmp_path / "nat.pth")
    shape = {"dilations": [[1, 2], [1]], "layer_scale": 0.5, **SMALL}
    net = create_model("nat_tiny", checkpoint=tmp_path / "nat.pth", features_only=True, **shape, **options).eval()
    x = torch.randn(1, 3, 50, 36)
    expected = model.forward_intermediates(x, options.get("out_indices"), intermediates_only=True)
    torch.testing.assert_close(net(x), expected)
    assert [tuple(y.shape) for y in net(x)] == [(1, 16, 13, 9), (1, 32, 7, 5)][: len(expected)]
    assert net.feature_info.channels() == [16, 32][: len(expected)]


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _small(drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 40, 33)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)


def test_bias_tables_train_without_weight_decay() -> None:
    assert sum(name.endswith("attn.rpb") for name in _small().no_weight_decay()) == 3


def test_export_survives_a_free_batch(compiling: None) -> None:
    model = _small()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 40, 33),), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 3, 40, 33)
    torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2,)}, "do not fit together"),
        ({"dilations": [[1], [1]]}, "do not fit together"),
        ({"num_heads": (3, 4)}, "not a multiple of its 3 heads"),
        ({"merging": "pool"}, "merging='pool'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


def test_bad_images() -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(1, 1, 32, 32))
