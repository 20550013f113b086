"""MEDUSA: the scale head, the attention body, and whole classifiers in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.medusa import GlobalAttention, ScaleHead
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.medusa import Medusa, checkpoint_filter_fn
from tests.goldens.systems._tensors import arrays, tensors

ATTENTION = {"resnet1": "multi_scale", "resnet2": "single_scale"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case is told by its inputs: a mask for a head, an image for a classifier, else the body alone."""
    weights, given = tensors(state), tensors(inputs)
    if "mask" in given:
        return arrays(_head(weights, given))
    return arrays(_model(config, weights, given) if "image" in given else _body(weights, given))


def _head(weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {name.rpartition(".")[2]: value for name, value in weights.items()}
    head = ScaleHead(len(own["bias"]))
    head.load_state_dict(own)
    x, mask = given["x"].requires_grad_(), given["mask"].requires_grad_()
    y = head(x, mask)
    outputs = {"y": y, "attention": head.attention(mask, (x.shape[2], x.shape[3]))}
    if "dout" in given:
        (y * given["dout"]).sum().backward()
        assert x.grad is not None
        assert mask.grad is not None
        outputs |= {"dx": x.grad, "dmask": mask.grad}
    return outputs


def _body(weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    body = GlobalAttention()
    body.load_state_dict({name.removeprefix("sem."): value for name, value in weights.items()})
    return {"attention": body(given["semantic_image"])}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    attention = ATTENTION.get(config["variant"], config.get("mode") or "residual")
    model = Medusa(
        config["image_size"], config["semantic_size"], num_classes=config["num_classes"], attention=attention
    )
    load_checkpoint(model, weights, checkpoint_filter_fn)
    image, semantic = given["image"], given["semantic_image"]
    *_, last = maps = list(model.eval().scales(image, semantic))
    logits, weighting = model.forward_head(last), model.attend(image, semantic)
    outputs = {"attention": weighting, "logits": logits, "probabilities": logits.softmax(-1)}
    outputs["features"] = model.forward_head(last, pre_logits=True)
    for scale, features in enumerate(maps):
        head = getattr(model.sem, str(600 + scale), None)
        if head is not None:
            outputs[f"scale_{600 + scale}"] = head.attention(weighting, features.shape[2:])
    return outputs
