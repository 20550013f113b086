"""Vision models on timm's parts, one file per system; importing this package registers them all with timm."""

from manyheads.models.vision import (
    agent,
    biformer,
    davit,
    dyn_perceiver,
    halonet,
    inline,
    litv2,
    maxvit,
    nat,
    shvit,
    spectformer,
    spectformer_pyramid,
    transnext,
)

__all__ = [
    "agent",
    "biformer",
    "davit",
    "dyn_perceiver",
    "halonet",
    "inline",
    "litv2",
    "maxvit",
    "nat",
    "shvit",
    "spectformer",
    "spectformer_pyramid",
    "transnext",
]
