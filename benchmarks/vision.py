"""Whole vision models against timm's of the same name, random weights, eager and compiled; a length is a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

NAMES = ("davit_tiny", "maxvit_tiny_tf_224", "shvit_s1", "shvit_s4", "halonet26t", "haloregnetz_b")


def against_timm(name: str, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    """Images, and the model as we and as timm build it; SHViT also with its norms folded."""
    import timm

    from manyheads.models import create_model

    def build(create: Callable, fuse: bool = False) -> Callable:
        model = create(name).to(device, dtype).eval()
        return torch.no_grad()(_fused(model) if fuse else model)

    images = torch.randn(batch, *timm.get_pretrained_cfg(name).input_size, device=device, dtype=dtype)
    contestants = {"manyheads": build(create_model), "timm": build(timm.create_model)}
    if name.startswith("shvit"):
        contestants |= {"manyheads, folded": build(create_model, True), "timm, folded": build(timm.create_model, True)}
    contestants |= {f"{who}, compiled": torch.compile(contestants[who], dynamic=False) for who in ("manyheads", "timm")}
    return images, contestants


def _fused(model):
    from timm.utils.model import reparameterize_model

    return model.fuse() if model.__class__.__module__.startswith("manyheads") else reparameterize_model(model)


BUILDERS = {name: partial(against_timm, name) for name in NAMES}
