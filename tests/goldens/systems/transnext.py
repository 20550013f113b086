"""TransNeXt: the aggregated-attention operator, its layers, and whole models in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from manyheads.layers.transnext import AggregatedAttention, CosineAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.transnext import TransNeXt, checkpoint_filter_fn
from manyheads.ops.aggregated import aggregated_attention
from tests.goldens.systems._tensors import arrays, gradients, tensors

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
        return aggregated_attention(**renamed, window=config["window_size"])

    outputs = {"out": attend(**wanted)}
    if "dout" in given:
        outputs |= {f"d{name}": gradient for name, gradient in gradients(attend, wanted, given["dout"]).items()}
    return outputs


def _side(size: int | list[int] | None) -> int | None:
    return size[0] if isinstance(size, list) else size


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    shared = {"pretrain_side": _side(config.get("pretrain_size")), "qkv_bias": config.get("qkv_bias", True)}
    if "qkv.weight" in weights:
        layer: nn.Module = CosineAttention(config["dim"], config["num_heads"], **shared)
    else:
        layer = AggregatedAttention(
            config["dim"],
            config["num_heads"],
            window=config.get("window_size", 3),
            sr_ratio=config.get("sr_ratio", 1),
            fixed_pool_size=config.get("fixed_pool_size"),
            **shared,
        )
    named = checkpoint_filter_fn({f"x.attn.{key}": value for key, value in weights.items()}, layer)
    layer.load_state_dict({key.removeprefix("x.attn."): value for key, value in named.items()})
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
    plain = ("in_chans", "num_classes", "embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "qkv_bias")
    options = {name: config[name] for name in plain if name in config}
    options |= {name: config[name] for name in ("img_size", "pretrain_size", "fixed_pool_size") if name in config}
    window = config.get("window_size", 3)
    windows = [size for size in (window if isinstance(window, list) else [window]) if size]
    if "is_extrapolation" in config:
        options["position_bias"] = "extrapolate" if config["is_extrapolation"] else "interpolate"
    model = TransNeXt(**options, window_size=windows[0] if windows else 3).eval()
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
