"""Vision models on timm's parts, one file per system; importing this package registers them all with timm."""

from manyheads.models.vision import (
    agent,
    biformer,
    davit,
    halonet,
    inline,
    litv2,
    maxvit,
    nat,
    ninformer,
    shvit,
    sparsifiner,
    spectformer,
    spectformer_pyramid,
    transnext,
)

__all__ = [
    "agent",
    "biformer",
    "davit",
    "halonet",
    "inline",
    "litv2",
    "maxvit",
    "nat",
    "ninformer",
    "shvit",
    "sparsifiner",
    "spectformer",
    "spectformer_pyramid",
    "transnext",
]
