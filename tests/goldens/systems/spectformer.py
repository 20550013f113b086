"""SpectFormer: the spectral filter, the vanilla model, the pyramid, in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.spectral import SpectralGating
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import spectformer, spectformer_pyramid
from tests.goldens.systems._tensors import arrays, tensors, with_counters


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``."""
    weights, given = tensors(state), tensors(inputs)
    if "operator" in config["part"]:
        return arrays(_filter(config, weights, given))
    model = _vanilla if "vanilla" in config["part"] else _pyramid
    return arrays(model(config, weights, given))


def _filter(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    side = round(given["x"].shape[1] ** 0.5)
    grid = tuple(config.get("spatial_size") or (side, side))
    layer = SpectralGating(config["dim"], grid)
    layer.load_state_dict(weights)
    x = given["x"].requires_grad_("dy" in given)
    outputs = {"y": layer(x.unflatten(1, grid)).flatten(1, 2)}
    if "dy" in given:
        (outputs["y"] * given["dy"]).sum().backward()
        outputs |= {"dx": x.grad, "dcomplex_weight": layer.complex_weight.grad}
    return outputs


def _vanilla(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_chans", "num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "alpha")
    options = {name: config[name] for name in (*names, "mlp_ratio", "norm_eps") if name in config}
    options["representation_size"] = config.get("representation_size") or 0
    model = spectformer.SpectFormer(**options).eval()
    load_checkpoint(model, weights, spectformer.checkpoint_filter_fn)
    x = model.forward_features(given["image"])
    return {"features": model.forward_head(x, pre_logits=True), "logits": model.forward_head(x)}


def _pyramid(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_chans", "num_classes", "img_size", "stem_hidden_dim", "embed_dims", "depths", "num_heads")
    options = {name: config[name] for name in (*names, "mlp_ratios", "token_label") if name in config}
    model = spectformer_pyramid.SpectFormerPyramid(**options).eval()
    load_checkpoint(model, with_counters(weights, model), spectformer_pyramid.checkpoint_filter_fn)
    tokens = model.forward_features(given["image"])
    outputs = {"logits": model.forward_head(tokens), "cls_logits": model.head(tokens[:, 0])}
    outputs["logits_without_token_label"] = outputs["cls_logits"]
    if model.token_label:
        outputs["aux_logits"] = model.aux_head(tokens[:, 1:])
    return outputs
