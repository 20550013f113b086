"""SpectFormer: the spectral filter, the vanilla model, the pyramid, in the authors' key layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manyheads.layers.spectral import SpectralGating
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import spectformer, spectformer_pyramid
from tests.goldens.systems._tensors import arrays, tensors, through_layer, with_counters


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``."""
    weights, given = tensors(state), tensors(inputs)
    part = config.get("part", "operator" if "complex_weight" in weights else "")
    if "operator" in part or "complex_weight" in weights:
        return arrays(_filter(config, weights, given))
    model = _vanilla if "vanilla" in part or "pos_embed" in weights else _pyramid
    return arrays(model(config, weights, given))


def _filter(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens, rows = given["x"].shape[1], weights["complex_weight"].shape[0]
    grid = tuple(config.get("spatial_size") or (rows, tokens // rows))
    layer = SpectralGating(config.get("dim", given["x"].shape[2]), grid)
    layer.load_state_dict(weights)
    outputs = through_layer(layer, given["x"], given.get("dy", given.get("dout")), grid)
    return {"y": outputs["out"], **outputs}


def _vanilla(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_chans", "num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "alpha")
    options = {name: config[name] for name in (*names, "mlp_ratio", "norm_eps") if name in config}
    options["representation_size"] = config.get("representation_size") or 0
    if "head.weight" not in weights:
        options["num_classes"] = 0
    model = spectformer.SpectFormer(**options).eval()
    load_checkpoint(model, weights, spectformer.checkpoint_filter_fn)
    image = given["image"].requires_grad_("dlogits" in given)
    x = model.forward_features(image)
    outputs = {"features": model.forward_head(x, pre_logits=True), "logits": model.forward_head(x)}
    return outputs | _image_gradient(outputs["logits"], image, given)


def _pyramid(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_chans", "num_classes", "img_size", "stem_hidden_dim", "embed_dims", "depths", "num_heads")
    options = {name: config[name] for name in (*names, "mlp_ratios", "token_label") if name in config}
    options["norm_eps"] = config.get("block_norm_eps", 1e-6)
    options["token_label"] = options.get("token_label", "aux_head.weight" in weights)
    model = spectformer_pyramid.SpectFormerPyramid(**options).eval()
    load_checkpoint(model, with_counters(weights, model), spectformer_pyramid.checkpoint_filter_fn)
    image = given["image"].requires_grad_("dlogits" in given)
    tokens = model.forward_features(image)
    outputs = {"logits": model.forward_head(tokens), "cls_logits": model.head(tokens[:, 0])}
    outputs["logits_without_token_label"] = outputs["cls_logits"]
    if model.token_label:
        outputs["aux_logits"] = model.aux_head(tokens[:, 1:])
    return outputs | _image_gradient(outputs["logits"], image, given)


def _image_gradient(logits: Tensor, image: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    if "dlogits" not in given:
        return {}
    (gradient,) = torch.autograd.grad((logits * given["dlogits"]).sum(), image)
    return {"dimage": gradient, "dx": gradient}
