"""Agent and InLine attention in DeiT, PVT, Swin and CSwin: published sizes, layouts, image sizes, what timm expects."""

from __future__ import annotations

import pytest
import torch

from manyheads.layers import agent, shifted_window
from manyheads.models import create_model, load_checkpoint
from manyheads.models.evaluation import count_flops
from manyheads.models.recipes import recipe_for
from manyheads.models.training import make_optimizer
from manyheads.models.vision.agent import DENSE_AGENTS
from manyheads.models.vision.hosts import HostDense, common, deit, pvt
from manyheads.models.vision.hosts.common import checkpoint_filter_fn, dense_filter_fn

PARAMETERS = {
    "agent_deit_tiny": 6_015_640,
    "agent_deit_small": 22_647_112,
    "agent_deit_small_448": 23_070_472,
    "agent_deit_base": 87_204_904,
    "agent_pvt_tiny": 11_570_352,
    "agent_pvt_small": 20_635_066,
    "agent_pvt_medium": 35_921_746,
    "agent_pvt_medium_256": 36_083_682,
    "agent_pvt_large": 48_738_180,
    "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684,
    "agent_swin_small_288": 49_707_964,
    "agent_swin_base": 88_095_096,
    "agent_swin_base_384": 88_305_016,
    "agent_cswin_tiny": 20_458_672,
    "agent_cswin_small": 32_814_100,
    "agent_cswin_base": 73_249_696,
    "agent_cswin_base_384": 73_328_416,
    "inline_deit_tiny": 6_477_736,
    "inline_deit_small": 16_734_760,
    "inline_deit_base": 23_797_096,
    "inline_pvt_tiny": 12_032_232,
    "inline_pvt_small": 21_556_136,
    "inline_pvt_medium": 37_618_856,
    "inline_pvt_large": 51_154_280,
    "inline_swin_tiny": 29_223_544,
    "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120,
    "inline_swin_base_384": 88_465_320,
    "inline_cswin_tiny": 20_604_520,
    "inline_cswin_small": 33_032_872,
    "inline_cswin_base": 73_413_640,
    "inline_cswin_base_384": 73_413_640,
}
# Multiply-adds in 1e9 at the model's own size.
OPERATIONS = {
    "inline_deit_tiny": 1.114,
    "inline_pvt_tiny": 1.986,
    "inline_swin_tiny": 4.478,
    "inline_cswin_tiny": 4.331,
    "agent_deit_tiny": 1.2,
    "agent_pvt_tiny": 2.0,
    "agent_swin_tiny": 4.5,
    "agent_cswin_tiny": 4.3,
}
FOUR = {"depths": (1, 1, 2, 1), "num_classes": 7, "agent_num": (4, 4, 9, 4)}
SMALL = {
    "deit": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mixed": 2,
             "num_classes": 7},
    "pvt": {**FOUR, "img_size": 64, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2,) * 4},
    "swin": {**FOUR, "img_size": 128, "embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 32, "mlp_ratio": 2},
    "cswin": {**FOUR, "img_size": 32, "embed_dim": 8, "num_heads": (2, 2, 4, 8), "split_size": (1, 2, 1, 1),
              "mlp_ratio": 2},
}  # fmt: skip
NAMES = [f"{mixer}_{host}" for mixer in ("agent", "inline") for host in SMALL]
LETTERS = {"agent": "AAMB1", "inline": "IIMS1"}


def _small(name: str, **options):
    mixer, host = name.split("_")
    letters = {} if host == "deit" else {"attn_type": LETTERS[mixer]}
    if name == "agent_deit":
        letters["agent_num"] = 9
    torch.manual_seed(0)
    return create_model(f"{name}_tiny", **{**SMALL[host], **letters, "drop_path_rate": 0.0, **options}).eval()


def _image(name: str, batch: int = 2) -> torch.Tensor:
    side = SMALL[name.split("_")[1]]["img_size"]
    return torch.randn(batch, 3, side, side)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Meta tensors have no values to draw, and drawing none takes most of the time."""
    for room in (agent, shifted_window, common, deit, pvt):
        monkeypatch.setattr(room, "trunc_normal_", lambda tensor, std: tensor)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(undrawn, name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_published_operations(undrawn, name) -> None:
    with torch.device("meta"):
        operations = count_flops(create_model(name).eval(), torch.zeros(1, 3, 224, 224)) / 2e9
    assert operations == pytest.approx(OPERATIONS[name], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_authors_layout_with_buffers_and_wrappers(name) -> None:
    source, target = _small(name), _small(name)
    state = {key: torch.randn_like(value) for key, value in source.state_dict().items()}
    buffers = {
        "layers.0.blocks.1.attn_mask": torch.zeros(4),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4),
    }
    load_checkpoint(
        target, {"model": {**state, **(buffers if "_swin" in name else {})}, "epoch": 3}, checkpoint_filter_fn
    )
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())
    backbone = _small(name, num_classes=0)
    load_checkpoint(backbone, state, checkpoint_filter_fn)
    x = _image(name)
    torch.testing.assert_close(backbone(x), target.forward_head(target.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("name", NAMES)
def test_features_only_and_intermediates(name) -> None:
    model, x = _small(name), _image(name)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(last), model(x))
    assert [x.shape[1] for x in maps] == [info["num_chs"] for info in model.feature_info]
    for info, found in zip(model.feature_info, maps):
        assert found.shape[2] == x.shape[2] // info["reduction"]
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])
    options = {k: v for k, v in model.options.items() if k not in ("mixer", "drop_path_rate")}
    net = create_model(f"{name}_tiny", features_only=True, out_indices=(0, len(maps) - 1), **options).eval()
    assert [tuple(y.shape) for y in net(x)] == [tuple(maps[0].shape), tuple(maps[-1].shape)]


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_activations_gives_the_same_gradients(name) -> None:
    model, x = _small(name).train(), _image(name)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)
    assert all(gradient.any() for gradient in plain)


@pytest.mark.parametrize("name", NAMES)
def test_another_size_classifier_and_channels(name) -> None:
    model, before = _small(name, in_chans=1), _small(name, in_chans=1).state_dict()
    height, width = 2 * _image(name).shape[2], _image(name).shape[3]
    model.set_input_size((height, width))
    after = model.state_dict()
    resized = {key.split(".")[-1].rstrip("1234") for key in before if before[key].shape != after[key].shape}
    assert resized <= {"pos_embed", "relative_position_bias_table", "ah_bias", "ha_bias"}
    assert all(torch.equal(after[key], before[key]) for key in before if before[key].shape == after[key].shape)
    model.reset_classifier(2)
    x = torch.randn(1, 1, height, width)
    assert model(x).shape == (1, 2)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.set_input_size(width)
    assert [value.shape for value in model.state_dict().values()] == [
        value.shape for key, value in before.items() if not key.startswith("head.")
    ]


def test_positions_are_stretched_along_their_own_axes() -> None:
    model = _small("inline_deit")
    rows = torch.arange(4.0)[:, None, None].expand(4, 4, 24).reshape(1, 16, 24)
    model.pos_embed.data[:, 1:] = rows
    model.set_input_size((64, 32))
    stretched = model.pos_embed[0, 1:, 0].unflatten(0, (8, 4))
    assert (stretched.diff(dim=0) > 0).all()
    assert stretched.diff(dim=1).abs().max() < 1e-5
    model.set_input_size((32, 64))
    back = model.pos_embed[0, 1:, 0].unflatten(0, (4, 8))
    assert (back.diff(dim=0) > 0).all()
    assert back.diff(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_close(name) -> None:
    model, x = _small(name), _image(name, 1)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


# Every host and both mixers in the default suite, all pairs in the long one.
QUICK = {"inline_deit", "agent_pvt", "inline_swin", "agent_cswin"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_export_survives_a_free_batch(compiling, name) -> None:
    model = _small(name)
    free = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (_image(name),), dynamic_shapes=free)
    more = _image(name, 5)
    torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize("name", ["agent_pvt", "inline_pvt"])
def test_pyramids_read_images_of_other_sizes(name) -> None:
    model = _small(name, **({"any_size": True} if "agent" in name else {}))
    maps = model.forward_intermediates(torch.randn(1, 3, 77, 96), intermediates_only=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(19, 24), (9, 12), (4, 6), (2, 3)]


def test_a_later_stage_as_large_as_the_first_was_built_is_resized_all_the_same() -> None:
    model = _small("inline_pvt")
    # 256 tokens in stage 1 at 64 pixels; at 128 pixels stage 2 has as many, but was built for 64 of them.
    assert model(torch.randn(1, 3, 128, 128)).isfinite().all()


def test_only_matrices_decay_and_pyramids_positions() -> None:
    for name, position in (("inline_deit", 0), ("inline_pvt", 0.05)):
        model = _small(name)
        groups = make_optimizer(model, 1e-3, 0.05).param_groups
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        named = dict(model.named_parameters())
        assert {decay[id(p)] for key, p in named.items() if "pos_embed" in key} == {position}
        assert {decay[id(p)] for key, p in named.items() if p.ndim < 2 or key == "cls_token"} == {0}
        assert decay[id(model.head.weight)] == 0.05


def test_dense_swin_spares_the_agents_biases_from_decay() -> None:
    spared = _small("agent_swin", any_size=True).no_weight_decay()
    kinds = {name.split(".")[-1] for name in spared - _small("agent_swin").no_weight_decay()}
    assert kinds == {"an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"}


@pytest.mark.parametrize("host", ["swin", "pvt"])
def test_dense_trunks_give_maps_of_any_image(host) -> None:
    trunk = _small(f"agent_{host}", any_size=True, agent_grids=DENSE_AGENTS[host])
    grids = [module.agent_grid for module in trunk.modules() if isinstance(module, agent.AgentAttention)]
    assert set(grids) <= set(DENSE_AGENTS[host])
    dense = HostDense(trunk, (0, 2, 3), norms=host == "swin").eval()
    sizes = [tuple(x.shape) for x in dense(torch.randn(1, 3, 70, 101))]
    channels = [trunk.feature_info[stage]["num_chs"] for stage in (0, 2, 3)]
    # Swin pads to whole patches and even maps, PVT drops what is left over.
    maps = [(18, 26), (5, 7), (3, 4)] if host == "swin" else [(17, 25), (4, 6), (2, 3)]
    assert sizes == [(1, width, *size) for width, size in zip(channels, maps)]
    assert ("norm3.weight" in dense.state_dict()) == (host == "swin")


@pytest.mark.parametrize("host", ["swin", "pvt"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_backbones_of_detectors_load(host, prefix) -> None:
    def make() -> HostDense:
        return HostDense(_small(f"agent_{host}", any_size=True), norms=host == "swin").eval()

    source, target = make(), make()
    state = {name.removeprefix("trunk."): torch.randn_like(value) for name, value in source.state_dict().items()}
    official = {f"{prefix}{name}": value for name, value in state.items()}
    official |= {"neck.conv.weight": torch.zeros(1)} if prefix else {"norm.weight": torch.zeros(1)}
    load_checkpoint(target, {"state_dict": official}, dense_filter_fn)
    found = {name.removeprefix("trunk."): value for name, value in target.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in state.items())
    state.popitem()
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(make(), {f"{prefix}{name}": value for name, value in state.items()}, dense_filter_fn)


def test_inline_attention_needs_no_agents() -> None:
    model = create_model(
        "inline_swin_tiny", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), attn_type="IS", num_classes=3
    )
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match="differ in length"):
        create_model("agent_swin_tiny", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), attn_type="AB")


def test_recipes_are_the_published_ones() -> None:
    assert [recipe_for(f"inline_{size}").drop_path for size in ("deit_base", "pvt_large", "swin_base")] == [
        0.1,
        0.3,
        0.5,
    ]
    assert [recipe_for(f"inline_{size}").clip_grad for size in ("deit_tiny", "pvt_tiny", "cswin_base")] == [
        5.0,
        0.0,
        0.0,
    ]
    assert recipe_for("inline_cswin_base").weight_decay == 0.1
    tuned = recipe_for("inline_swin_base_384")
    assert (tuned.epochs, tuned.lr, tuned.weight_decay, tuned.crop_pct) == (30, 2e-5, 1e-8, 1.0)
    assert (recipe_for("agent_deit_tiny").drop_path, recipe_for("agent_deit_base").drop_path) == (0.0, 0.3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inline_deit", {"num_heads": 5}, "dim=24 is not a multiple of heads=5"),
        ("inline_deit", {"img_size": 36}, "whole patches of 8 pixels"),
        ("inline_deit", {"kernel": "softmax"}, "kernel='softmax' is not one of"),
        ("inline_pvt", {"attn_type": "IIS"}, "a letter for each of 4 stages"),
        ("inline_pvt", {"attn_type": "IIAS"}, r"I \(inline\), S or B"),
        ("inline_pvt", {"mixer_sr_ratios": (2, 1, 1, 1)}, "no key reduction, got 2"),
        ("inline_swin", {"window_size": 16}, "must cover the map of 32 x 32"),
        ("inline_swin", {"img_size": 72}, "odd map of 9 x 9 tokens"),
        ("inline_cswin", {"mixer_split_size": (1, 1, 1, 1)}, "makes one kernel for the whole map"),
        ("inline_cswin", {"split_size": (1, 2, 3, 1), "attn_type": "IISS", "img_size": 128}, "does not divide the map"),
        ("agent_deit", {"agent_num": 10}, "agents=10 must be a perfect square"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        _small(name, **options)


def test_bad_images() -> None:
    with pytest.raises(ValueError, match=r"image must be \(batch, 3, height, width\)"):
        _small("inline_pvt")(torch.randn(1, 4, 64, 64))
    with pytest.raises(ValueError, match="set_input_size resizes it"):
        _small("inline_deit")(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="leaves no token in stage 3"):
        _small("inline_pvt")(torch.randn(1, 3, 8, 64))
