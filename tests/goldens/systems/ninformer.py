"""NiNformer: the gating unit and the image model, in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.mixer_gate import MixerGating
from manyheads.models.checkpoints import load_checkpoint, rename
from manyheads.models.vision.ninformer import OFFICIAL, NiNformer, checkpoint_filter_fn
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``."""
    weights, given = tensors(state), tensors(inputs)
    return arrays((_unit if "operator" in config["part"] else _model)(config, weights, given))


def _unit(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = MixerGating(config["dim"], config["seq_len"], config["token_dim"], config["channel_dim"]).eval()
    layer.load_state_dict(rename(weights, OFFICIAL))
    x = given["x"].requires_grad_("dy" in given)
    outputs = {"y": layer(x), "gate": layer.mixer(x)}
    if "dy" in given:
        (outputs["y"] * given["dy"]).sum().backward()
        assert x.grad is not None
        outputs["dx"] = x.grad
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    model = NiNformer(
        in_chans=config.get("in_channels", 3),
        num_classes=config["num_classes"],
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        embed_dim=config["d_model"],
        depth=config["num_layers"],
        mlp_dim=config["d_ffn"],
        dropout=config.get("dropout", 0.5),
    ).eval()
    load_checkpoint(model, weights, checkpoint_filter_fn)
    x = model.forward_features(given["image"])
    return {"tokens": x.flatten(1, 2), "logits": model.forward_head(x)}
