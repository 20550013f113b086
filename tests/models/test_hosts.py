"""Agent and InLine attention in DeiT, PVT, Swin and CSwin: published sizes, layouts, image sizes, what timm expects."""

from __future__ import annotations

import pytest
import torch

from manyheads.models import create_model, load_checkpoint
from manyheads.models.evaluation import count_flops
from manyheads.models.vision.hosts.common import checkpoint_filter_fn

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


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_published_operations(name) -> None:
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
