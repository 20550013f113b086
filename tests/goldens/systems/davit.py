"""DaViT: the channel and window operators, and whole models in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.davit import WindowAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.davit import DaViT, checkpoint_filter_fn
from manyheads.ops.channel import channel_attention
from tests.goldens.systems._tensors import arrays, gradients, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``op``; a configuration without one is a model."""
    weights, given = tensors(state), tensors(inputs)
    operators = {"channel_attention": _channel, "window_attention": _window}
    return arrays(operators[config["op"]](config, weights, given) if "op" in config else _model(config, weights, given))


def _channel(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    q, k, v = given["q"], given["k"], given["v"]
    scale = config.get("scale")
    if isinstance(scale, str):
        scale = {"head_dim": q.shape[-1], "tokens": q.shape[2], "N": q.shape[2]}[scale.removesuffix("**-0.5")] ** -0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return channel_attention(q, k, v, scale=None if scale is None else float(scale))

    outputs = {"out": attend(q, k, v)}
    if "dout" in given:
        found = gradients(attend, {"q": q, "k": k, "v": v}, given["dout"])
        outputs |= {f"d{name}": gradient for name, gradient in found.items()}
    return outputs


def _window(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    window = config["window_size"]
    layer = WindowAttention(config["dim"], config["num_heads"], window=window, qkv_bias="qkv.bias" in weights)
    layer.load_state_dict(weights)
    return {"out": layer(given["x"])}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {"attn_types": "attention_types", "attention_types": "attention_types"}
    plain = ("in_chans", "num_classes", "depths", "embed_dims", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
    options = {name: config[name] for name in (*plain, "cpe_act", "down_kernel_size") if name in config}
    options |= {ours: config[theirs] for theirs, ours in renamed.items() if theirs in config}
    options["channel_flavour"] = "v2" if config.get("channel_attn_v2") else config.get("channel_flavour", "v1")
    model = DaViT(**options, drop_path_rate=config.get("drop_path_rate", 0.0)).eval()
    load_checkpoint(model, weights, checkpoint_filter_fn)
    image = given["x"].requires_grad_("dlogits" in given)
    last, maps = model.forward_intermediates(image)
    logits = model.forward_head(last)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if "dlogits" in given:
        (logits * given["dlogits"]).sum().backward()
        outputs["dx"] = image.grad
    return outputs
