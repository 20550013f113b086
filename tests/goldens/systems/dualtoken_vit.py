"""DualToken-ViT: the token module and the model, in the key layout of the specification."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.dual_token import PositionAwareTokens
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import dualtoken
from tests.goldens.systems._tensors import arrays, tensors, with_counters


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``."""
    part = _model if config["part"].startswith("model") else _module
    return arrays(part(config, tensors(state), tensors(inputs)))


def _module(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {name: config[name] for name in ("steps", "token_size", "mlp", "alpha") if name in config}
    module = PositionAwareTokens(config["dim"], config["num_heads"], **options)
    module.load_state_dict(weights)
    gradient = next((given[name] for name in ("dy", "dx_global", "grad_out") if name in given), None)
    x, tokens = (given[name].requires_grad_() for name in ("x", "g"))
    maps = x.permute(0, 2, 3, 1)
    spread, new = module(maps, tokens)
    outputs = {"x_global": spread.permute(0, 3, 1, 2), "g_new": new, "x_ga": module.aggregate(maps)}
    if gradient is not None:
        (outputs["x_global"] * gradient).sum().backward()
        found = {"x": x, "g": tokens, **dict(module.named_parameters())}
        outputs |= {f"d{name}": tensor.grad for name, tensor in found.items() if tensor.grad is not None}
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_chans", "num_classes", "embed_dims", "num_heads", "mlp_ratios", "conv_ratio", "steps", "token_size")
    options = {name: config[name] for name in (*names, "mlp", "alpha") if name in config}
    model = dualtoken.DualTokenViT(**options, depths=config["num_layers"]).eval()
    load_checkpoint(model, with_counters(weights, model), dualtoken.checkpoint_filter_fn)
    features, tokens = model.forward_tokens(given["image"])
    pooled = model.forward_head(features, pre_logits=True)
    return {"features": pooled, "global_tokens": tokens, "logits": model.head(pooled)}
