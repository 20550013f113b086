"""LITv2: the HiLo operator, its layer, and whole models in the authors' key layout, as classifier or dense trunk."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.hilo import HiLoAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.litv2 import LITv2, LITv2Dense, checkpoint_filter_fn
from manyheads.ops.hilo import hilo_attention
from tests.goldens.systems._tensors import arrays, gradients, tensors, with_counters


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An operator (``op``), a layer (``dim``) or a model."""
    weights, given = tensors(state), tensors(inputs)
    if "op" in config:
        return arrays(_operator(config, given))
    return arrays(_layer(config, weights, given) if "dim" in config else _model(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = config.get("scale")
    scale = None if scale in (None, "head_dim**-0.5") else float(scale)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hilo_attention(q, k, v, window=config["window_size"], low_heads=config["low_heads"], scale=scale)

    outputs = {"out": attend(given["q"], given["k"], given["v"])}
    if "dout" in given:
        found = gradients(attend, {name: given[name] for name in "qkv"}, given["dout"])
        outputs |= {f"d{name}": gradient for name, gradient in found.items()}
    return outputs


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = HiLoAttention(
        config["dim"],
        config["num_heads"],
        window=config["window_size"],
        alpha=config["alpha"],
        qkv_bias=config.get("qkv_bias", "h_qkv.bias" in weights or "l_q.bias" in weights),
    )
    layer.load_state_dict(weights)
    x = given["x"]
    side = round(x.shape[1] ** 0.5)
    grid = (config.get("height", side), config.get("width", side))

    def attend(x: Tensor) -> Tensor:
        return layer(x.unflatten(1, grid)).flatten(1, 2)

    outputs = {"out": attend(x)}
    if "dout" in given:
        outputs |= {f"d{name}": gradient for name, gradient in gradients(attend, {"x": x}, given["dout"]).items()}
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {"has_msa": "attention", "local_ws": "windows"}
    plain = ("in_chans", "num_classes", "embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "alpha")
    options = {name: config[name] for name in (*plain, "patch_size", "drop_path_rate") if name in config}
    options |= {ours: config[theirs] for theirs, ours in renamed.items() if theirs in config}
    if "attention" in options:
        options["attention"] = [bool(flag) for flag in options["attention"]]
    model = LITv2(**options).eval()
    image = given["x"].requires_grad_("dlogits" in given)
    if "norm0.weight" in weights:
        dense = LITv2Dense(model, config.get("out_indices", range(len(model.layers)))).eval()
        load_checkpoint(dense, with_counters(weights, dense), checkpoint_filter_fn)
        return {f"feature{s + 1}": x for s, x in zip(dense.out_indices, dense(image))}
    load_checkpoint(model, with_counters(weights, model), checkpoint_filter_fn)
    last, maps = model.forward_intermediates(image)
    logits = model.forward_head(last)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if "dlogits" in given:
        (logits * given["dlogits"]).sum().backward()
        outputs["dx"] = image.grad
    return outputs
