"""TransNeXt: the aggregated-attention operator, its layers, and whole models in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from manyheads.layers.transnext import AggregatedAttention, CosineAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.transnext import TransNeXt, checkpoint_filter_fn
from manyheads.ops.aggregated import aggregated_attention, length_scaled_cosine_attention
from tests.goldens.systems._tensors import arrays, gradients, sides, tensors, through_layer

_NAMES = {"q": "query", "k": "key", "v": "value", "k_pool": "pooled_key", "v_pool": "pooled_value"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An operator (``op``), a layer (``dim``) or a model."""
    weights, given = tensors(state), tensors(inputs)
    if "op" in config:
        return arrays(_operator(config, given))
    return arrays(_layer(config, weights, given) if "dim" in config else _model(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in given.items() if name != "dout"}

    def attend(**named: Tensor) -> Tensor:
        renamed = {_NAMES.get(name, name): tensor for name, tensor in named.items()}
        if "pooled_key" in renamed:
            return aggregated_attention(**renamed, window=config.get("window_size", 3))
        return _plain(**renamed)

    outputs = {"out": attend(**wanted)}
    if "dout" in given:
        outputs |= {f"d{name}": gradient for name, gradient in gradients(attend, wanted, given["dout"]).items()}
    return outputs


def _plain(query: Tensor, key: Tensor, value: Tensor, **learnt: Tensor) -> Tensor:
    """The plain variant, on tokens or on maps."""
    learnt = {"bias" if name == "bias_pool" else name: tensor for name, tensor in learnt.items()}
    on_map, grid = query.ndim == 5, query.shape[2:4]
    if on_map:
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    out = length_scaled_cosine_attention(query, key, value, **learnt)
    return out.unflatten(2, grid) if on_map else out


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    side = config.get("pretrain_size")
    grid = sides(config, given["x"].shape[1])
    base = config.get("input_resolution") or grid
    shared = {
        "pretrain_side": tuple(side) if isinstance(side, list) else side,
        "base": (base, base) if isinstance(base, int) else tuple(base),
        "position_bias": _bias(config),
        "qkv_bias": config.get("qkv_bias", True),
    }
    if "qkv.weight" in weights:
        layer: nn.Module = CosineAttention(config["dim"], config.get("num_heads", 8), **shared)
    else:
        layer = AggregatedAttention(
            config["dim"],
            config.get("num_heads", 8),
            window=config.get("window_size", 3),
            sr_ratio=config.get("sr_ratio", 1),
            fixed_pool_size=config.get("fixed_pool_size"),
            **shared,
        )
    named = checkpoint_filter_fn({f"x.attn.{key}": value for key, value in weights.items()}, layer)
    layer.load_state_dict({key.removeprefix("x.attn."): value for key, value in named.items()})
    outputs = through_layer(layer, given["x"], given.get("dout"), grid)
    # Gradients under the authors' names, the 1 x 1 convolution's in its shape.
    named = {name.replace("dposition.", "d"): value for name, value in outputs.items()}
    if "dsr.weight" in named:
        named["dsr.weight"] = named["dsr.weight"][..., None, None]
    return named


def _bias(config: dict) -> str:
    return "extrapolate" if config.get("is_extrapolation", True) else "interpolate"


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = ("in_chans", "num_classes", "embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "qkv_bias")
    names = (*plain, "img_size", "pretrain_size", "fixed_pool_size", "norm_eps", "window_size")
    options = {name: config[name] for name in names if name in config}
    model = TransNeXt(**options, position_bias=_bias(config)).eval()
    if "head.weight" not in weights:
        model.reset_classifier(0)
    load_checkpoint(model, weights, checkpoint_filter_fn)
    image = given["x"].requires_grad_("dlogits" in given)
    last, maps = model.forward_intermediates(image)
    logits = model.forward_head(last)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if "dlogits" in given:
        (logits * given["dlogits"]).sum().backward()
        outputs["dx"] = image.grad
    return outputs
