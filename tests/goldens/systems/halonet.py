"""HaloNet: the operator, the layer, and whole models in timm's key layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from manyheads.layers.halo import HaloAttention
from manyheads.models.vision.halonet import HaloNet, checkpoint_filter_fn
from manyheads.ops.halo import halo_attention
from tests.goldens.systems._gradients import Computed, of_backbone, with_gradients
from tests.goldens.systems._tensors import arrays, tensors

# The reference's defaults, its names of what all stages share, and where it nests options.
AUTHORS = {
    "stem_type": "3x3", "stem_chs": 32, "stem_pool": "maxpool", "act": "relu", "downsample": "conv1x1",
    "num_features": 0, "stride": 2, "bottle_ratio": 1.0, "block_size": 8, "halo_size": 3, "dim_head": None,
    "qk_ratio": 1.0, "group_size": 0, "attn_layer": "", "rd_ratio": 1 / 16, "bottle_in": False, "linear_out": False,
}  # fmt: skip
SHARED = {
    "abgl": {"bottle_in": "expand_input", "linear_out": "linear_out"},
    "a": {"block_size": "block", "halo_size": "halo"},
    "agl": {"dim_head": "head_dim", "qk_ratio": "qk_ratio"},
    "l": {"r": "lambda_window"},
    "b": {"group_size": "group_width", "attn_layer": "channel_attention", "rd_ratio": "squeeze"},
}
OFF = ("stem_pool", "downsample", "attn_layer")  # where None means none, not the default
NESTED = ("self_attn_kwargs", "attn_kwargs", "block_kwargs")
MIXERS = {"halo": "a", "lambda": "l", "bottleneck": "g"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``op``; a configuration without one is a model or, without stages, the layer."""
    weights, given = tensors(state), tensors(inputs)
    if "op" in config:
        return arrays(_operator(config, given))
    return arrays((_model if "stages" in config else _layer)(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = config.get("scale")

    mask = given.pop("mask", None)

    def attend(q: Any, k: Any, v: Any, rel_height: Tensor | None, rel_width: Tensor | None) -> Tensor:
        stride = config.get("stride", 1)
        pool = stride == 2 and (config.get("avg_down") or config["block_size"] % 2 == 1)
        out = halo_attention(
            q, k, v, block=config["block_size"], halo=config["halo_size"], stride=1 if pool else stride,
            rel_height=rel_height, rel_width=rel_width, scale=None if isinstance(scale, str) else scale,
            scale_pos_embed=config.get("scale_pos_embed", False), mask_padding=config.get("mask_padding", False),
            mask=None if mask is None else mask.bool().reshape(-1, *k.shape[2:4]).expand(k.shape[0], -1, -1),
        )  # fmt: skip
        if not pool:
            return out
        maps = F.avg_pool2d(out.permute(0, 1, 4, 2, 3).flatten(1, 2), 2)
        return maps.unflatten(1, (q.shape[1], -1)).permute(0, 1, 3, 4, 2)

    def compute(inputs: dict[str, Tensor]) -> Computed:
        return {"out": attend(*(inputs.get(name) for name in ("q", "k", "v", "rel_height", "rel_width")))}, {}

    return with_gradients(compute, given)


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    config = {name: value for name, value in config.items() if value is not None}
    stride = config.get("stride", 1)
    layer = HaloAttention(
        config["dim"], config.get("dim_out"), block=config.get("block_size", 8), halo=config.get("halo_size", 3),
        heads=config.get("num_heads", 8), head_dim=config.get("dim_head"), qk_ratio=config.get("qk_ratio", 1.0),
        stride=1 if config.get("avg_down") else stride, scale_pos_embed=config.get("scale_pos_embed", False),
        mask_padding=config.get("mask_padding", False), ceil=False,
    )  # fmt: skip
    layer.eval().load_state_dict(weights)

    def compute(inputs: dict[str, Tensor]) -> Computed:
        out = layer(inputs["x"])
        out = F.avg_pool2d(out, stride) if config.get("avg_down") and stride > 1 else out
        return {"out": out}, dict(layer.named_parameters())

    return with_gradients(compute, given)


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    given_options = {name: value for name, value in config.items() if value is not None or name in OFF}
    config = {**AUTHORS, **given_options}
    stages = [_stage(stage, config) for stage in config["stages"]]
    plain = ("num_classes", "in_chans", "value_ratio", "scale_pos_embed", "mask_padding")
    options = {name: config[name] for name in plain if name in config}
    for kinds, names in SHARED.items():
        options |= {ours: _shared(stages, kinds, theirs) for theirs, ours in names.items()}
    options |= {"img_size": config["img_size"]} if "img_size" in config else {"img_size": given["x"].shape[2:]}
    model = HaloNet(
        **options,
        patterns=[stage["pattern"] for stage in stages],
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
    for part in (*nested, {name: value for name, value in stage.items() if value is not None or name in OFF}):
        known |= part
    known["attn_layer"] = known["attn_layer"] or ""
    blocks = stage["blocks"] if "blocks" in stage else [stage["type"]] * stage.get("depth", 1)
    return known | {"pattern": "".join("b" if block == "bottle" else mixer for block in blocks)}


def _shared(stages: list[dict], kinds: str, name: str) -> Any:
    """An option that all stages with blocks of some kinds have in common."""
    (value,) = {stage[name] for stage in stages if set(kinds) & set(stage["pattern"])} or {stages[0][name]}
    return value
