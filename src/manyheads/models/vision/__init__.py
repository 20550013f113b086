"""Vision models on timm's parts, one file per system; importing this package registers them all with timm."""

from manyheads.models.vision import biformer, davit, litv2, maxvit, nat, transnext

__all__ = ["biformer", "davit", "litv2", "maxvit", "nat", "transnext"]
