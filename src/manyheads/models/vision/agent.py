"""Agent-DeiT, -PVT, -Swin and -CSwin: four backbones whose attention goes through agent tokens.

The backbones are those of ``manyheads.models.vision.hosts``; here stand the published variants and their layout.
Parameters carry the authors' names. The trunk of the detectors is ``HostDense(trunk, norms=True)`` of
``trunk = create_model("agent_swin_tiny", any_size=True, agent_grids=DENSE_AGENTS["swin"])``; PVT's is without norms.

Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from manyheads.models.registry import register
from manyheads.models.vision.hosts import HostCSwin, HostDeiT, HostPVT, HostSwin
from manyheads.models.vision.hosts.common import FIRST_CONV, checkpoint_filter_fn

# The agents that the detectors' trunks pool, one (height, width) a stage.
DENSE_AGENTS = {"swin": ((9, 9), (12, 12), (14, 14), (7, 7)), "pvt": ((12, 12), (16, 16), (28, 28), (28, 28))}


def _deit(dim: int, heads: int, drop_path: float, **rest: Any) -> dict:
    return {"embed_dim": dim, "num_heads": heads, "drop_path_rate": drop_path, **rest}


def _pvt(depths: tuple[int, ...], drop_path: float, **rest: Any) -> dict:
    return {"depths": depths, "drop_path_rate": drop_path, **rest}


def _swin(dim: int, depth: int, attn_type: str, drop_path: float, **rest: Any) -> dict:
    heads = tuple(dim // 32 * 2**s for s in range(4))
    return {"embed_dim": dim, "depths": (2, 2, depth, 2), "num_heads": heads, "attn_type": attn_type,
            "drop_path_rate": drop_path, **rest}  # fmt: skip


def _cswin(dim: int, depths: tuple[int, ...], heads: int, drop_path: float, **rest: Any) -> dict:
    return {"embed_dim": dim, "depths": depths, "num_heads": tuple(heads * 2**s for s in range(4)),
            "drop_path_rate": drop_path, **rest}  # fmt: skip


VARIANTS: dict[str, tuple[type[nn.Module], dict]] = {
    "agent_deit_tiny": (HostDeiT, _deit(192, 3, 0.0)),
    "agent_deit_small": (HostDeiT, _deit(384, 6, 0.1)),
    "agent_deit_small_448": (HostDeiT, _deit(384, 6, 0.1, img_size=448)),
    "agent_deit_base": (HostDeiT, _deit(768, 12, 0.3, mixed=4, agent_num=81)),
    "agent_pvt_tiny": (HostPVT, _pvt((2, 2, 2, 2), 0.1)),
    "agent_pvt_small": (HostPVT, _pvt((3, 4, 6, 3), 0.1)),
    "agent_pvt_medium": (HostPVT, _pvt((3, 4, 18, 3), 0.3)),
    "agent_pvt_medium_256": (HostPVT, _pvt((3, 4, 18, 3), 0.3, img_size=256)),
    "agent_pvt_large": (HostPVT, _pvt((3, 8, 27, 3), 0.3)),
    "agent_swin_tiny": (HostSwin, _swin(96, 6, "AAAB", 0.2)),
    "agent_swin_small": (HostSwin, _swin(96, 18, "AABB", 0.3)),
    "agent_swin_small_288": (HostSwin, _swin(96, 18, "AABB", 0.3, img_size=288, window_size=72)),
    "agent_swin_base": (HostSwin, _swin(128, 18, "AAMB2", 0.5)),
    "agent_swin_base_384": (HostSwin, _swin(128, 18, "AAMB2", 0.5, img_size=384, window_size=96)),
    "agent_cswin_tiny": (HostCSwin, _cswin(64, (2, 4, 18, 1), 2, 0.2)),
    "agent_cswin_small": (HostCSwin, _cswin(64, (3, 6, 29, 2), 2, 0.4)),
    "agent_cswin_base": (HostCSwin, _cswin(96, (3, 6, 29, 2), 4, 0.5)),
    "agent_cswin_base_384": (HostCSwin, _cswin(96, (3, 6, 29, 2), 4, 0.7, img_size=384, split_size=(1, 2, 12, 12))),
}
for _name, (_host, _options) in VARIANTS.items():
    _size = _options.get("img_size", 224)
    register(
        _name,
        _host,
        {"mixer": "agent", **_options},
        convert=checkpoint_filter_fn,
        stages=12,
        feature_cls="getter",
        first_conv=FIRST_CONV[_host.__name__],
        classifier="head",
        input_size=(3, _size, _size),
        pool_size=(_size // 32, _size // 32),
        fixed_input_size=True,
        # Both sides are resized to 256/224 of the size, then cropped; the largest Swin resizes straight to its size.
        crop_pct=1.0 if _name == "agent_swin_base_384" else 0.875,
        crop_mode="squash",
    )
