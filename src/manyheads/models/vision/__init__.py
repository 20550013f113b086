"""Vision models on timm's parts, one file per system; importing this package registers them all with timm."""

from manyheads.models.vision import biformer, davit, nat

__all__ = ["biformer", "davit", "nat"]
