"""BiFormer: bi-level routing as an operator and a layer, the other mixers, and whole models, in the authors' keys."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.layers.biformer import BiLevelRoutingAttention, ConvMixer, FullAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.biformer import BiFormer, BiFormerDense, checkpoint_filter_fn
from manyheads.ops.bilevel_routing import bilevel_routing_attention
from tests.goldens.systems._tensors import arrays, gradients, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An operator case has q, k, v; a model case has ``depth`` or names a model; any other is a layer."""
    weights, given = tensors(state), tensors(inputs)
    if "q" in given:
        return arrays(_operator(config, given))
    whole = any(key.startswith("downsample_layers.") for key in weights)
    return arrays((_model if whole else _layer)(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {
        "regions": config["n_win"],
        "topk": config["topk"],
        "scale": config.get("scale") or config.get("qk_scale"),
    }
    options |= _routing(config, 0)
    maps = {name: given[name] for name in "qkv"}
    out, routing = bilevel_routing_attention(*maps.values(), **options, return_routing=True)
    outputs = {"out": out, "index": routing.index, "scores": routing.scores}
    if "dout" in given:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return bilevel_routing_attention(q, k, v, **options)

        found = gradients(attend, maps, given["dout"])
        outputs |= {f"d{name}": gradient for name, gradient in found.items()}
    return outputs


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    nchw = any(value.ndim == 4 and key.split(".")[0] in _LINEAR for key, value in weights.items()) or _is_nchw(config)
    dim, topk, kernel = config["dim"], config.get("topk", 4), config.get("side_dwconv", 3)
    if "proj.weight" in weights:
        lepe = ("value" if nchw else "input") if "lepe.weight" in weights else "none"
        kernel = weights["lepe.weight"].shape[-1] if lepe != "none" else 0
        bias = "qkv.bias" in weights
        layer = FullAttention(dim, config.get("num_heads", 8), lepe=lepe, lepe_kernel=kernel, qkv_bias=bias)
    elif "1.weight" in weights:
        layer = ConvMixer(dim)
        nchw = config.get("layout", "nhwc") == "nchw"
    else:
        layer = BiLevelRoutingAttention(
            dim, config.get("num_heads", 8), regions=config.get("n_win", 7), topk=topk, lepe_kernel=kernel,
            formulation="current" if nchw else "legacy", auto_pad=nchw or config.get("auto_pad", False),
            qk_dim=config.get("qk_dim"), scale=config.get("qk_scale"),
            output_projection=config.get("param_attention", "qkvo") == "qkvo",
            param_routing=config.get("param_routing", False), **_routing(config, 0),
        )  # fmt: skip
    # The loader renames keys of whole models, so the layer plays the attention of one.
    names = {f"stages.0.0.attn.{key}": value for key, value in weights.items()} | {"downsample_layers.": torch.zeros(0)}
    converted = checkpoint_filter_fn(names, nn.Identity())
    prefix = "stages.0.blocks.0.attn."
    layer.load_state_dict({key.removeprefix(prefix): v for key, v in converted.items() if key.startswith(prefix)})

    x = given["x"].requires_grad_()
    out = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nchw else layer(x)
    outputs = {"out": out}
    upstream = given.get("dout", given.get("dy"))
    if upstream is not None:
        (out * upstream).sum().backward()
        outputs["dx"] = x.grad
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    model = BiFormer(**_model_options(config, weights)).eval()
    if any(key.startswith("extra_norms.") for key in weights):
        model = BiFormerDense(model).eval()
    # The reader leaves out what a constructor computes: here the counters of the batch norms.
    kept = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    load_checkpoint(model, checkpoint_filter_fn(weights, model) | kept)
    upstream = given.get("dlogits")
    image = given["x"].requires_grad_(upstream is not None)
    if isinstance(model, BiFormerDense):
        return {f"feature{s}": x for s, x in enumerate(model(image), 1)}
    _, maps = model.forward_intermediates(image)
    logits = model(image)
    outputs = {"logits": logits, **{f"feature{s}": x for s, x in enumerate(maps, 1)}}
    if upstream is not None:
        (logits * upstream).sum().backward()
        outputs["dx"] = image.grad
    return outputs


def _model_options(config: dict, weights: dict[str, Tensor]) -> dict:
    # The Swin-Tiny layout has a stem of one convolution; its convolutional flavour keeps every weight four-dimensional.
    stl = "downsample_layers.0.3.weight" not in weights
    nchw = any(key.endswith("mlp.0.weight") and value.ndim == 4 for key, value in weights.items()) or _is_nchw(config)
    widths = config["embed_dim"]
    names = {
        "in_chans": "in_chans", "num_classes": "num_classes", "depth": "depths", "embed_dim": "embed_dims",
        "head_dim": "head_dim", "n_win": "regions", "topks": "topks", "mlp_ratios": "mlp_ratios",
        "side_dwconv": "lepe_kernel", "param_routing": "param_routing", "qk_scale": "qk_scale",
        "pre_norm": "pre_norm", "mlp_dwconv": "mlp_dwconv", "drop_path_rate": "drop_path_rate",
    }  # fmt: skip
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    scale = config.get("layer_scale_init_value", -1)
    routing = _routing(config, None)
    routing.pop("kv_size")
    sizes = [_routing(config, s)["kv_size"] for s in range(len(widths))]
    options |= {
        **routing,
        "kv_sizes": sizes,
        "stem": "patch" if stl else "conv",
        "pos_embed": not stl and config.get("before_attn_dwconv", 3) > 0,
        "formulation": "current" if nchw else "legacy",
        "full_lepe": "value" if nchw else "input",
        "auto_pad": nchw or config.get("auto_pad", False),
        "output_projection": config.get("param_attention", "qkvo") == "qkvo",
        "layer_scale": scale if scale > 0 else None,
    }
    if config.get("qk_dims"):
        options["qk_dims"] = [qk_dim or dim for qk_dim, dim in zip(config["qk_dims"], widths)]
    if "lepe_kernel" not in options:
        kernels = [value.shape[-1] for key, value in weights.items() if key.endswith("attn.lepe.weight")]
        options["lepe_kernel"] = kernels[0] if kernels else 0
    return {"mlp_ratios": 4.0, "topks": (8, 8, -1, -1)[: len(widths)] if not stl else (1, 4, 16, -2), **options}


_LINEAR = ("qkv", "proj", "qkv_linear", "output_linear")


def _is_nchw(config: dict) -> bool:
    named = " ".join(
        str(config.get(name, "")) for name in ("op", "layer", "model", "class", "arch", "variant", "layout")
    )
    return "nchw" in named.lower()


def _routing(config: dict, stage: int | None) -> dict:
    """The routing options; a stage picks its entry of the options that are lists in a whole model's configuration."""
    mode = config.get("kv_downsample_mode", "identity")
    size = None
    if mode != "identity" and stage is not None:
        several, single = ("kv_per_wins", "kv_per_win") if mode.startswith("ada") else (
            "kv_downsample_ratios", "kv_downsample_ratio"
        )  # fmt: skip
        size = config[several][stage] if several in config else config.get(single, 4)
        size = size if size > 0 else None
    return {
        "soft_routing": config.get("soft_routing", False),
        "diff_routing": config.get("diff_routing", False),
        "kv_downsample": mode,
        "kv_size": size,
    }
