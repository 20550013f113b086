"""SHViT: the attention layer, and whole models in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.shvit import SingleHeadAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.shvit import SHViT, checkpoint_filter_fn
from tests.goldens.systems._tensors import arrays, tensors, with_counters

RENAMED = {"embed_dim": "embed_dims", "partial_dim": "partial_dims", "qk_dim": "qk_dims", "depth": "depths"}
PLAIN = ("in_chans", "num_classes", "types", "distillation", "embed_dims", "partial_dims", "qk_dims", "depths")


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A configuration with one width is the layer, one with a width for each stage a model."""
    weights, given = tensors(state), tensors(inputs)
    return arrays(_layer(config, weights, given) if "dim" in config else _model(config, weights, given))


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    partial_dim = config.get("partial_dim", config.get("pdim"))
    layer = SingleHeadAttention(config["dim"], partial_dim, qk_dim=config.get("qk_dim", 16))
    layer.eval().load_state_dict(with_counters(weights, layer))
    x = given["x"].requires_grad_("dout" in given)
    out = layer(x)
    if "dout" not in given:
        return {"out": out}
    (out * given["dout"]).sum().backward()
    assert x.grad is not None
    return {"out": out, "dx": x.grad}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {name: config[name] for name in PLAIN if name in config}
    options |= {ours: config[theirs] for theirs, ours in RENAMED.items() if theirs in config}
    model = SHViT(**options).eval()
    load_checkpoint(model, with_counters(checkpoint_filter_fn(weights, model), model), checkpoint_filter_fn)
    image = given["x"].requires_grad_("dlogits" in given)
    last, maps = model.forward_intermediates(image)
    logits = model.forward_head(last)
    assert isinstance(logits, Tensor)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if "dlogits" in given:
        (logits * given["dlogits"]).sum().backward()
        assert image.grad is not None
        outputs["dx"] = image.grad
    return outputs
