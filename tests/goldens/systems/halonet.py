"""HaloNet: the operator, and whole models in timm's key layout."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.halonet import HaloNet, checkpoint_filter_fn
from manyheads.ops.halo import halo_attention
from tests.goldens.systems._tensors import arrays, gradients, tensors, with_counters

KINDS = {"bottle": "b", "self_attn": "a"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``op``; a configuration without one is a model."""
    weights, given = tensors(state), tensors(inputs)
    return arrays(_operator(config, given) if "op" in config else _model(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = config.get("scale")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor | None = None, rel_width: Tensor | None = None
    ) -> Tensor:
        stride = config.get("stride", 1)
        pool = stride == 2 and (config.get("avg_down") or config["block_size"] % 2 == 1)
        out = halo_attention(
            q, k, v, block=config["block_size"], halo=config["halo_size"], stride=1 if pool else stride,
            rel_height=rel_height, rel_width=rel_width, scale=None if isinstance(scale, str) else scale,
            scale_pos_embed=config.get("scale_pos_embed", False), mask_padding=config.get("mask_padding", False),
            mask=given.get("mask"),
        )  # fmt: skip
        if not pool:
            return out
        maps = F.avg_pool2d(out.permute(0, 1, 4, 2, 3).flatten(1, 2), 2)
        return maps.unflatten(1, (q.shape[1], -1)).permute(0, 1, 3, 4, 2)

    wanted = {name: given[name] for name in ("q", "k", "v", "rel_height", "rel_width") if name in given}
    outputs = {"out": attend(**wanted)}
    if "dout" in given:
        outputs |= {f"d{name}": gradient for name, gradient in gradients(attend, wanted, given["dout"]).items()}
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    stages = config["stages"]
    same = {"num_classes": "num_classes", "in_chans": "in_chans", "block_size": "block", "halo_size": "halo"}
    same |= {"stem_chs": "stem_width", "stem_type": "stem", "act": "act", "num_features": "final_width"}
    same |= {"dim_head": "head_dim", "qk_ratio": "qk_ratio", "scale_pos_embed": "scale_pos_embed"}
    same |= {"mask_padding": "mask_padding", "value_ratio": "value_ratio", "linear_out": "linear_out"}
    same |= {"group_size": "group_width", "attn_layer": "channel_attention", "rd_ratio": "squeeze"}
    options = {ours: config[theirs] for theirs, ours in same.items() if config.get(theirs) is not None}
    model = HaloNet(
        **options,
        patterns=["".join(KINDS[kind] for kind in stage["blocks"]) for stage in stages],
        embed_dims=[stage["channels"] for stage in stages],
        strides=[stage["stride"] for stage in stages],
        ratios=[stage["bottle_ratio"] for stage in stages],
        heads=[stage.get("num_heads", config.get("num_heads", 8)) for stage in stages],
        stem_pool=bool(config.get("stem_pool")),
        project_shortcut=config.get("downsample", "conv1x1") == "conv1x1",
        expand_input=config.get("bottle_in", False),
    ).eval()
    load_checkpoint(model, with_counters(weights, model), checkpoint_filter_fn)
    image = given["x"].requires_grad_("dlogits" in given)
    last, maps = model.forward_intermediates(image)
    logits = model.forward_head(last)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if "dlogits" in given:
        (logits * given["dlogits"]).sum().backward()
        assert image.grad is not None
        outputs["dx"] = image.grad
    return outputs
