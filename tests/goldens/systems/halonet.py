"""HaloNet: the operator, and whole models in timm's key layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.vision.halonet import HaloNet, checkpoint_filter_fn
from manyheads.ops.halo import halo_attention
from tests.goldens.systems._gradients import of_backbone
from tests.goldens.systems._tensors import arrays, gradients, tensors

# The reference's defaults, its names of what all stages share, and where it nests options.
AUTHORS = {
    "stem_type": "3x3", "stem_chs": 32, "stem_pool": "maxpool", "act": "relu", "downsample": "conv1x1",
    "num_features": 0, "stride": 2, "bottle_ratio": 1.0, "block_size": 8, "halo_size": 3, "dim_head": None,
    "qk_ratio": 1.0, "group_size": 0, "attn_layer": "", "rd_ratio": 1 / 16, "bottle_in": False, "linear_out": False,
}  # fmt: skip
OF_ATTENTION = {"block_size": "block", "halo_size": "halo", "dim_head": "head_dim", "qk_ratio": "qk_ratio"}
SHARED = OF_ATTENTION | {
    "r": "lambda_window", "group_size": "group_width", "attn_layer": "channel_attention", "rd_ratio": "squeeze",
    "bottle_in": "expand_input", "linear_out": "linear_out",
}  # fmt: skip
NESTED = ("self_attn_kwargs", "attn_kwargs", "block_kwargs")
MIXERS = {"halo": "a", "lambda": "l", "bottleneck": "g"}


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
    config = {**AUTHORS, **{name: value for name, value in config.items() if value is not None}}
    stages = [_stage(stage, config) for stage in config["stages"]]
    plain = ("num_classes", "in_chans", "value_ratio", "scale_pos_embed", "mask_padding")
    options = {name: config[name] for name in plain if name in config}
    kinds = [stage["mixer"] for stage in stages]
    options |= {ours: _shared(stages, theirs) for theirs, ours in SHARED.items()}
    options |= {"img_size": config["img_size"]} if "img_size" in config else {"img_size": given["x"].shape[2:]}
    model = HaloNet(
        **options,
        patterns=["".join("b" if kind == "bottle" else mixer for kind in stage["blocks"])
                  for stage, mixer in zip(stages, kinds)],
        embed_dims=[stage["channels"] for stage in stages],
        strides=[stage["stride"] for stage in stages],
        ratios=[stage["bottle_ratio"] for stage in stages],
        heads=[stage["num_heads"] for stage in stages],
        stem=config["stem_type"] or "3x3",
        stem_width=config["stem_chs"],
        stem_pool=bool(config["stem_pool"]),
        final_width=config["num_features"],
        act=config["act"],
        project_shortcut=config["downsample"] == "conv1x1",
    )  # fmt: skip
    return of_backbone(model, weights, checkpoint_filter_fn, given, training=bool(config.get("training")))


def _stage(stage: dict, config: dict) -> dict:
    """A stage with everything that it takes from the model or from the reference's defaults."""
    nested = [source.get(name) or {} for source in (config, stage) for name in NESTED]
    mixer = MIXERS[stage.get("self_attn_layer") or config.get("self_attn_layer") or "halo"]
    known = {"num_heads": 8 if mixer == "a" else 4, "r": 13, **config}
    for part in (*nested, {name: value for name, value in stage.items() if value is not None}):
        known |= part
    blocks = stage["blocks"] if "blocks" in stage else [stage["type"]] * stage.get("depth", 1)
    return known | {"blocks": blocks, "mixer": mixer}


def _shared(stages: list[dict], name: str) -> Any:
    """An option that all stages (with attention, where it is the attention's) have in common."""
    attending = [stage for stage in stages if "self_attn" in stage["blocks"]] or stages
    (value,) = {stage[name] for stage in (attending if name in OF_ATTENTION else stages)}
    return value
