"""TAP and ADL: the pooling, the loss with its gradients, FAN and RVT in the authors' key layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.layers.tap import TokenAwarePooling
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import fan, rvt
from manyheads.models.vision.token_robustness import attention_maps
from manyheads.objectives.diversification import attention_diversification_loss
from tests.goldens.systems._tensors import arrays, tensors, with_counters

OPTIONS = ("num_classes", "mlp_ratio", "num_scales", "in_chans", "patch_size")
PREFIX = "dilation_predictor."


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case is told by its inputs and keys: raw scores for the loss, a map for TAP, an image for a model."""
    weights, given = tensors(state), tensors(inputs)
    if "raw_0" in given:
        return arrays(_loss(config, given))
    if "image" in given:
        return arrays(_model(config, weights, given))
    return arrays(_pooling(config, weights, given))


def _loss(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    raw = [given[name].requires_grad_() for name in sorted(given) if name.startswith("raw_")]
    maps = [(x + given.get(f"column_{i}", torch.zeros(()))).softmax(-1) for i, x in enumerate(raw)]
    loss = attention_diversification_loss(maps, threshold=config.get("threshold", 2))
    loss.backward()
    return {"loss": loss, **{f"draw_{i}": x.grad for i, x in enumerate(raw) if x.grad is not None}}


def _pooling(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = TokenAwarePooling(config["dim"], config["num_scales"], temperature=config.get("temperature", 1)).eval()
    own = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    layer.load_state_dict(with_counters(own, layer))
    x = given["x"].requires_grad_("dout" in given)
    y = layer(x)
    outputs = {"y": y, "scale_weights": layer.scale_weights(x)}
    if "dout" in given:
        (y * given["dout"]).sum().backward()
        assert x.grad is not None
        outputs["dx"] = x.grad
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    model, convert = (_rvt if any(name.startswith("transformers.") for name in weights) else _fan)(config, weights)
    load_checkpoint(model, with_counters(convert(weights, model), model), convert)
    model.eval()
    with attention_maps(model) as maps:
        last = model.forward_features(given["image"])
    features = model.forward_head(last, pre_logits=True)
    adl = attention_diversification_loss(maps, threshold=config.get("threshold", 1))
    outputs = {"features": features, "logits": model.forward_head(last), "adl": adl}
    return outputs | {"attention_first": maps[0], "attention_last": maps[-1]}


def _rvt(config: dict, weights: dict[str, Tensor]) -> tuple[rvt.RVT, object]:
    options = {name: config[name] for name in OPTIONS if name in config}
    masked = config.get("masked_block", 0) if config.get("use_mask") else 0
    model = rvt.RVT(
        base_dims=config["base_dims"], depths=config["depth"], num_heads=config["heads"], masked_blocks=masked,
        **options,
    )  # fmt: skip
    return model, rvt.checkpoint_filter_fn


def _fan(config: dict, weights: dict[str, Tensor]) -> tuple[nn.Module, object]:
    options = {name: config[name] for name in OPTIONS[:-1] if name in config}
    heads = config.get("num_heads", config.get("heads"))
    depths = config.get("depths", ()) if any(".backbone." in name for name in weights) else ()
    dims = config.get("dims", (128, 256))
    model = fan.FAN(
        embed_dim=weights["cls_token"].shape[-1], depth=config["depth"], num_heads=heads, conv_depths=depths,
        conv_dims=dims, **options,
    )  # fmt: skip
    return model, fan.checkpoint_filter_fn
