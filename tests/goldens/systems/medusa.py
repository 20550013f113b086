"""MEDUSA: the scale head, the attention body, and whole classifiers in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.medusa import GlobalAttention, ScaleHead, legacy_resize
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.medusa import Medusa, checkpoint_filter_fn
from tests.goldens.systems._gradients import Computed, by_their_names, with_gradients
from tests.goldens.systems._tensors import arrays, tensors

ATTENTION = {"resnet1": "multi_scale", "resnet2": "single_scale"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case is told by its inputs: a mask for a head, an image for a classifier, else the body alone."""
    weights, given = tensors(state), tensors(inputs)

    def compute(given: dict[str, Tensor]) -> Computed:
        if "mask" in given:
            return _head(weights, given) if weights else _resized(config, given)
        return _model(config, weights, given) if "image" in given else _body(weights, given)

    return arrays(with_gradients(compute, given))


def _head(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    own = {name.rpartition(".")[2]: value for name, value in weights.items()}
    head = ScaleHead(len(own["bias"]))
    head.load_state_dict(own)
    x, mask = given["x"], given["mask"]
    outputs = {"y": head(x, mask), "attention": head.attention(mask, (x.shape[2], x.shape[3]))}
    return outputs, by_their_names(head, weights, dict(zip(own, weights.values())))


def _resized(config: dict, given: dict[str, Tensor]) -> Computed:
    """A mask on an image (resnet0) or alone, without weights."""
    align = bool(config.get("align_corners", config.get("variant") == "resnet0"))
    rows, columns = given["x"].shape[2:] if "x" in given else config["feature_size"]
    resized = legacy_resize(given["mask"], (rows, columns), align_corners=align)
    if "x" not in given:
        return {"y": resized, "resized": resized}, {}
    masked = given["x"] * resized
    return {"y": masked if config.get("mode") == "mask" else given["x"] + masked, "resized": resized}, {}


def _body(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    own = {name.removeprefix("sem."): value for name, value in weights.items()}
    body = GlobalAttention(len(own["1.bias"]))
    body.load_state_dict(own)
    image = given.get("semantic_image", next(iter(given.values())))
    return {"attention": body(image)}, by_their_names(body, weights, own)


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    image, semantic = given["image"], given["semantic_image"]
    model = Medusa(
        config.get("image_size") or tuple(image.shape[2:]), config.get("semantic_size") or tuple(semantic.shape[2:]),
        in_chans=image.shape[1], num_classes=config.get("num_classes", len(weights["final_output.bias"])),
        attention=ATTENTION.get(config["variant"], config.get("mode") or "residual"),
        width=len(weights["conv1.bias"]), body_width=len(weights["sem.1.bias"]),
    )  # fmt: skip
    converted = checkpoint_filter_fn(weights, model)
    load_checkpoint(model, converted)
    model.train(bool(config.get("training", False)))
    weighting = model.attend(image, semantic)
    *_, last = maps = list(model.scales(image, semantic))
    logits = model.forward_head(last)
    outputs = {"logits": logits, "probabilities": logits.softmax(-1), "attention": weighting}
    outputs["features"] = model.forward_head(last, pre_logits=True)
    for scale, features in enumerate(maps):
        head = getattr(model.sem, str(600 + scale), None)
        if head is not None:
            outputs[f"scale_{600 + scale}"] = head.attention(weighting, (features.shape[2], features.shape[3]))
    if model.attention == "single_scale":
        # Called 603 after its place here, 600 after its number.
        outputs["scale_600"] = outputs["scale_603"]
    return outputs, by_their_names(model, weights, converted)
