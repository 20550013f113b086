"""Vision models on timm's parts, one file per system; importing this package registers them all with timm."""

from manyheads.models.vision import davit

__all__ = ["davit"]
