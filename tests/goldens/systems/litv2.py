"""LITv2: the HiLo operator, its layer, and whole models in the authors' key layout, as classifier or dense trunk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manyheads.layers.hilo import HiLoAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.litv2 import LITv2, LITv2Dense, checkpoint_filter_fn
from manyheads.ops.hilo import hilo_attention, low_head_count
from tests.goldens.systems._tensors import arrays, gradients, sides, tensors, through_layer, with_counters


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An operator (``op``), a layer (``dim``) or a model."""
    weights, given = tensors(state), tensors(inputs)
    if "op" in config:
        return arrays(_operator(config, given))
    return arrays(_layer(config, weights, given) if "dim" in config else _model(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = config.get("scale")
    scale = None if scale in (None, "head_dim**-0.5") else float(scale)

    window, heads = config.get("window_size", 2), given["q"].shape[1]
    low = config.get("low_heads", heads - config["high_heads"] if "high_heads" in config else None)
    if low is None:
        low = low_head_count(config.get("num_heads", heads), config.get("alpha", 0.5), window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hilo_attention(q, k, v, window=window, low_heads=low, scale=scale)

    outputs = {"out": attend(given["q"], given["k"], given["v"])}
    if "dout" in given:
        found = gradients(attend, {name: given[name] for name in "qkv"}, given["dout"])
        outputs |= {f"d{name}": gradient for name, gradient in found.items()}
    return outputs


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = HiLoAttention(
        config["dim"],
        config.get("num_heads", 8),
        window=config.get("window_size", 2),
        alpha=config.get("alpha", 0.5),
        scale=config.get("qk_scale") or None,
        qkv_bias=config.get("qkv_bias", "h_qkv.bias" in weights or "l_q.bias" in weights),
    )
    layer.load_state_dict(weights)
    x = given["x"]
    return through_layer(layer, x, given.get("dout"), sides(config, x.shape[1]))


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {"has_msa": "attention", "local_ws": "windows"}
    plain = (
        "in_chans",
        "num_classes",
        "embed_dim",
        "depths",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "qk_scale",
        "alpha",
    )
    options = {name: config[name] for name in (*plain, "patch_size", "drop_path_rate") if name in config}
    options |= {ours: config[theirs] for theirs, ours in renamed.items() if theirs in config}
    if "attention" in options:
        options["attention"] = [bool(flag) for flag in options["attention"]]
    if "head.weight" not in weights:
        options["num_classes"] = 0
    model = LITv2(**options).eval()
    image = given["x"].requires_grad_(len(given) > 1)
    normed = [stage for stage in range(len(model.layers)) if f"norm{stage}.weight" in weights]
    if normed:
        dense = LITv2Dense(model, normed).eval()
        load_checkpoint(dense, with_counters(weights, dense), checkpoint_filter_fn)
        found = {f"feature{s + 1}": x for s, x in zip(dense.out_indices, dense(image))}
        wanted = [(found[name] * given[f"d{name}"]).sum() for name in found if f"d{name}" in given]
        if wanted:
            torch.stack(wanted).sum().backward()
            found["dx"] = image.grad
        return found
    load_checkpoint(model, with_counters(weights, model), checkpoint_filter_fn)
    last, maps = model.forward_intermediates(image)
    logits = model.forward_head(last)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if "dlogits" in given:
        (logits * given["dlogits"]).sum().backward()
        outputs["dx"] = image.grad
    return outputs
