"""MoH-ViT: TransNeXt whose positions choose and weigh their attention heads.

The model is ``TransNeXt`` with ``shared_heads`` and ``active_heads``; this file has the published sizes. The number in
a name is the percentage of the heads at work.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, table 1 and its code.
"""

from __future__ import annotations

from manyheads.models.registry import register
from manyheads.models.vision.transnext import VARIANTS as TRANSNEXT
from manyheads.models.vision.transnext import TransNeXt, checkpoint_filter_fn

# name: (the backbone, shared heads of each stage, active routed heads of each stage)
_PUBLISHED = {
    "moh_transnext_small_80": ("transnext_small", (3, 6, 3, 8), (0, 0, 6, 12)),
    "moh_transnext_small_75": ("transnext_small", (3, 6, 3, 4), (0, 0, 6, 12)),
    "moh_transnext_base_75": ("transnext_base", (4, 8, 4, 5), (0, 0, 8, 16)),
    "moh_transnext_base_50": ("transnext_base", (2, 2, 2, 4), (2, 4, 6, 8)),
}
VARIANTS = {
    name: {**TRANSNEXT[backbone], "shared_heads": shared, "active_heads": active}
    for name, (backbone, shared, active) in _PUBLISHED.items()
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        TransNeXt,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="stages.0.patch_embed.proj",
        classifier="head",
        crop_pct=0.875,
    )
