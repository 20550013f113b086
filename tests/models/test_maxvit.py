"""MaxViT: published sizes, three checkpoint layouts, timm as oracle, any image size, what timm expects of a model."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import maxxvit

from manyheads.models import CheckpointError, create_model, load_checkpoint
from manyheads.models.vision.maxvit import MaxViT
from manyheads.models.vision.maxvit_checkpoints import checkpoint_filter_fn

SMALL = {
    "depths": (1, 2),
    "embed_dims": (16, 32),
    "stem_width": (8, 16),
    "head_dim": 8,
    "img_size": 64,
    "num_classes": 7,
}
PARAMETERS = {
    "maxvit_tiny": 30_916_528,
    "maxvit_tiny_tf_384": 30_977_008,
    "maxvit_tiny_tf_512": 31_049_584,
    "maxvit_small_tf_224": 68_927_956,
    "maxvit_small_tf_384": 69_018_676,
    "maxvit_small_tf_512": 69_127_540,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_base_tf_384": 119_653_468,
    "maxvit_base_tf_512": 119_876_380,
    "maxvit_large_tf_224": 211_785_560,
    "maxvit_large_tf_384": 212_033_240,
    "maxvit_large_tf_512": 212_330_456,
    "maxvit_xlarge_tf_224": 506_987_643,
    "maxvit_xlarge_tf_384": 475_323_472,
    "maxvit_xlarge_tf_512": 475_769_296,
    "maxvit_pico_rw_256": 7_457_996,
    "maxvit_nano_rw_256": 15_451_148,
    "maxvit_tiny_rw_224": 29_057_312,
    "maxvit_rmlp_pico_rw_256": 7_515_980,
    "maxvit_rmlp_nano_rw_256": 15_501_452,
    "maxvit_rmlp_tiny_rw_256": 29_148_896,
    "maxvit_rmlp_small_rw_224": 64_895_044,
    "maxvit_rmlp_base_rw_224": 116_135_788,
}


def _small(**options) -> MaxViT:
    return create_model("maxvit_tiny", **{**SMALL, "head_hidden_size": 24, **options}).eval()


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and statistic away from what it was initialised to."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "var" in name else 0.1 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, **({"num_classes": 21_843} if name == "maxvit_xlarge_tf_224" else {}))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def _timm(flavour: str, **options) -> torch.nn.Module:
    styles = {
        "tf": {"stem_bias": True, "head_hidden_size": 24, **maxxvit._tf_cfg()},
        "rw": maxxvit._rw_max_cfg(),
        "rmlp": maxxvit._rw_max_cfg(rel_pos_type="mlp", init_values=0.3),
    }[flavour]
    styles["transformer_cfg"].dim_head = 8
    config = maxxvit.MaxxVitCfg(
        embed_dim=SMALL["embed_dims"], depths=SMALL["depths"], block_type=("M", "M"), stem_width=SMALL["stem_width"],
        **styles,
    )  # fmt: skip
    return maxxvit.MaxxVit(config, img_size=options.get("img_size", 64), num_classes=7).eval()


@pytest.mark.parametrize("flavour", ["tf", "rw", "rmlp"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_timm_computes_the_same_with_the_same_weights(flavour: str, channels_last: bool) -> None:
    theirs = _shaken(_timm(flavour))
    extra = {"tf": {}, "rw": {"head_hidden_size": 0}, "rmlp": {"head_hidden_size": 0, "layer_scale": 0.3}}[flavour]
    ours = _small(flavour=flavour, **extra)
    load_checkpoint(ours, theirs.state_dict(), checkpoint_filter_fn)
    x = torch.randn(2, 3, 64, 64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    # With gradients another path is taken.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_other_image_sizes_resize_the_tables() -> None:
    for flavour in ("tf", "rw"):
        source = _small(flavour=flavour)
        larger = _small(flavour=flavour, img_size=96)
        load_checkpoint(larger, source.state_dict(), checkpoint_filter_fn)
        source.set_input_size(96)
        x = torch.randn(1, 3, 96, 96)
        torch.testing.assert_close(source(x), larger(x))
        assert source.window_size == source.grid_size == (3, 3)


@pytest.mark.parametrize("size", [(64, 96), (33, 50), (1, 7)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = _small()
    x = torch.randn(2, 3, *size)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for depth, features in enumerate(maps):
        side = [-(-s // 2) for s in size]
        for _ in range(depth + 1):
            side = [-(-s // 2) for s in side]
        assert features.shape[2:] == tuple(side)
    # What is padded is no key: an image alone and beside another one are the same.
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_padding_may_be_refused() -> None:
    model = _small(pad=False)
    assert model(torch.randn(1, 3, 64, 128)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"need multiples of 64 x 64; nearest sizes: \(64 or 128\) x 64 \(or pad"):
        model(torch.randn(1, 3, 100, 30))


def _tensorflow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state under the names and in the layouts of the authors' TensorFlow code."""
    stem = {"conv1": "conv_0", "norm1": "norm_0", "conv2": "conv_1"}
    conv = {"shortcut.expand": "shortcut_conv", "pre_norm": "pre_norm", "conv1_1x1": "expand_conv",
            "norm1": "expand_norm", "conv2_kxk": "depthwise_conv", "norm2": "depthwise_norm",
            "conv3_1x1": "shrink_conv",
            "se.fc1": "se/reduce_conv2d", "se.fc2": "se/expand_conv2d"}  # fmt: skip
    half = {"norm1": "attn_layer_norm", "norm2": "ffn_layer_norm", "mlp.fc1": "ffn{}/expand_dense",
            "mlp.fc2": "ffn{}/shrink_dense"}  # fmt: skip
    head = {"norm": "final_layer_norm", "pre_logits.fc": "cls_head/inner_dense", "fc": "cls_head/logit_dense"}
    result = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        parts = module.split(".")
        norm = leaf in ("running_mean", "running_var") or "norm" in parts[-1]
        leaf = {"running_mean": "moving_mean", "running_var": "moving_variance"}.get(leaf, leaf)
        if norm:
            leaf = {"weight": "gamma", "bias": "beta"}.get(leaf, leaf)
        elif leaf == "weight":
            leaf, value = "kernel", value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
        if leaf == "num_batches_tracked":
            continue
        if parts[0] == "stem":
            name = f"stem/{stem[parts[1]]}"
        elif parts[0] == "head":
            name = head[".".join(parts[1:])]
        else:
            block, kind, rest = f"block_{int(parts[1]):02}_{int(parts[3]):02}", parts[4], ".".join(parts[5:])
            suffix = "_1" if kind == "attn_grid" else ""
            if kind == "conv":
                name = f"{block}/mbconv/{conv[rest]}"
                if rest == "conv2_kxk":
                    leaf, value = "depthwise_kernel", value.transpose(2, 3)
            elif rest == "attn.qkv":
                heads = value.shape[-1] // 3 // 8
                for slot, part in zip("qkv", value.chunk(3, dim=-1)):
                    shape = (heads, 8) if leaf == "bias" else (part.shape[0], heads, 8)
                    name = "bias" if leaf == "bias" else "weight"
                    result[f"{block}/attention{suffix}/{slot}/{name}"] = part.reshape(shape)
                continue
            elif rest == "attn.proj":
                name, heads = f"{block}/attention{suffix}/o", value.shape[0] // 8
                if leaf == "kernel":
                    leaf, value = "weight", value.reshape(heads, 8, -1)
            elif rest == "attn.rel_pos":
                name, leaf = f"{block}/attention{suffix}", "relative_bias"
            else:
                name = half[rest].format(suffix) if "{}" in half[rest] else half[rest] + suffix
                name = f"{block}/{name}"
        result[f"{name}/{leaf}"] = value.clone()
    return result


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("prefix", ["", "maxvit/"])
def test_tensorflow_variables_are_converted(averaged: bool, prefix: str) -> None:
    source = _shaken(_small())
    state = {prefix + key: value for key, value in _tensorflow(source.state_dict()).items()}
    if averaged:
        shadows = {f"{k}/ExponentialMovingAverage": v for k, v in state.items() if "moving_" not in k}
        state = {k: v + (0 if "moving_" in k else 1) for k, v in state.items()} | shadows
    state |= {"global_step": torch.tensor(3), "block_00_00/mbconv/expand_conv/kernel/Adam": torch.zeros(3)}
    ours = _small()
    load_checkpoint(ours, state, checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), source(x))


def test_flavours_do_not_mix() -> None:
    with pytest.raises(CheckpointError, match=r"table of timm's \(rw\) models"):
        load_checkpoint(_small(), _small(flavour="rw").state_dict(), checkpoint_filter_fn)
    with pytest.raises(CheckpointError, match=r"table of the authors' \(tf\) models"):
        load_checkpoint(_small(flavour="rmlp"), _small().state_dict(), checkpoint_filter_fn)


def test_a_flat_table_of_unknown_partition_is_refused() -> None:
    oblong = _small(flavour="rw", window_size=(2, 3)).state_dict()
    with pytest.raises(CheckpointError, match="15 offsets, no square table"):
        load_checkpoint(_small(flavour="rw"), oblong, checkpoint_filter_fn)
    load_checkpoint(_small(flavour="rw", window_size=(2, 3)), oblong, checkpoint_filter_fn)


def test_convolutional_projections_become_linear() -> None:
    source = _small(flavour="rw")
    state = {k: v[..., None, None] if ".attn.qkv.weight" in k or ".fc1.weight" in k else v
             for k, v in source.state_dict().items() if ".se." not in k}  # fmt: skip
    state |= {k: v for k, v in source.state_dict().items() if ".se." in k}
    ours = _small(flavour="rw")
    load_checkpoint(ours, state, checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), source(x))


def test_features_only_loads_checkpoints(tmp_path) -> None:
    model = _small()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "maxvit.pth")
    options = {**SMALL, "head_hidden_size": 24, "checkpoint": tmp_path / "maxvit.pth"}
    net = create_model("maxvit_tiny", features_only=True, **options).eval()
    x = torch.randn(2, 3, 50, 33)
    for ours, expected in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, expected)
    assert net.feature_info.reduction() == [4, 8]


def test_a_backbone_leaves_the_classifier_of_a_file_aside() -> None:
    source, backbone = _small(), _small(num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(source.forward_head(source.forward_features(x), pre_logits=True), backbone(x))


def test_intermediates_choose_stages() -> None:
    model = _small(flavour="rw", head_hidden_size=0)
    x = torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x, indices=1, norm=True)
    torch.testing.assert_close(maps, [last])
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert first.shape == (1, 16, 16, 16)


def test_axes_choose_what_the_halves_attend_to() -> None:
    block = _small(axes=("block", "block")).stages[1].blocks[0]
    assert [block.attn_block.attn.axis, block.attn_grid.attn.axis] == ["block", "block"]


def test_training_options() -> None:
    model = _small(drop_path_rate=0.5, attn_drop=0.1).train()
    rates = [getattr(b.conv.drop_path, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.25, 0.5])
    assert len(model.no_weight_decay()) == 6
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _small().train()
    x = torch.randn(2, 3, 64, 40)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    model = _small(in_chans=1)
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 40, 40)).shape == (1, 2)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 40, 40)).shape == (1, 24)


def test_export_survives_a_free_batch(compiling: None) -> None:
    model = _small(depths=(1,), embed_dims=(16,))
    x = torch.randn(2, 3, 64, 60)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 3, 64, 60)
        torch.testing.assert_close(program.module()(more), model(more))


def test_compiles_whole(compiling: None) -> None:
    model = _small(depths=(1,), embed_dims=(16,))
    x = torch.randn(1, 3, 64, 60)
    with torch.no_grad():
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
        ({"embed_dims": (12, 32)}, "dim=12 is not a multiple of head_dim=8"),
        ({"flavour": "torch"}, "flavour='torch'"),
        ({"axes": ("block",)}, "two halves"),
        ({"axes": ("block", "row")}, "'row' is not one of 'block', 'grid'"),
        ({"img_size": 20}, "below 32 pixels; give window_size"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small()(torch.randn(shape))
    with pytest.raises(ValueError, match="needs img_size or window_size"):
        _small().set_input_size()


def test_registered_with_timm() -> None:
    config = timm.data.resolve_model_data_config(create_model("maxvit_tiny_tf_384", **SMALL))
    assert config["input_size"] == (3, 384, 384)
    assert config["mean"] == (0.5, 0.5, 0.5)
