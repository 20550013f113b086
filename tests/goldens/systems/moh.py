"""MoH: the layer, gated TransNeXt layers and models, DiT, and the parameter-free router in a Llama."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.adapt.mixture_of_heads import MixtureOfHeads
from manyheads.data.cache_names import returned_cache, with_cache
from manyheads.layers.mixture_of_heads import MixtureOfHeadsAttention, collect_routing
from manyheads.layers.transnext import AggregatedAttention, CosineAttention
from manyheads.models import moh_dit
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.moh_dit import MoHDiT
from manyheads.models.vision.transnext import TransNeXt, checkpoint_filter_fn
from tests.goldens.systems._tensors import arrays, tensors

_NOT_LLAMAS = ("model_type", "shared_heads", "routed_active", "pattern", "chunks")


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A language model (``vocab_size``), a layer (``dim``), or MoH-ViT."""
    weights, given = tensors(state), tensors(inputs)
    if "vocab_size" in config:
        return arrays(_language(config, weights, given))
    if "t" in given:
        return arrays(_dit(config, weights, given))
    return arrays(_layer(config, weights, given) if "proj.weight" in weights else _vit(config, weights, given))


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    x = given["x"].requires_grad_()
    config = {"dim": weights["proj.weight"].shape[0], **config}
    if "temperature" in weights:
        layer, grid = _transnext_layer(config, weights, x)
        call = lambda: layer(x.unflatten(1, grid)).flatten(1, 2)  # noqa: E731
        named = checkpoint_filter_fn({f"x.attn.{key}": value for key, value in weights.items()}, layer)
        layer.load_state_dict({key.removeprefix("x.attn."): value for key, value in named.items()})
    else:
        options = {name: config[name] for name in ("head_dim", "kv_heads") if name in config}
        layer = MixtureOfHeadsAttention(
            config["dim"], config["num_heads"], shared=config["shared_head"], active=config["routed_head"],
            causal=config.get("pattern", "").startswith("causal"), qkv_bias="qkv.bias" in weights, **options,
        )  # fmt: skip
        layer.load_state_dict({f"router.{key}" if key.startswith("wg") else key: weights[key] for key in weights})
        call = lambda: layer(x, given.get("context"))  # noqa: E731
    with collect_routing(layer) as routing:
        out = call()
    found = next(iter(routing.values()))
    outputs = {"out": out, "gates": found.gates.flatten(1, -2), "aux_loss": found.balance_loss()}
    grad = given.get("dout", given.get("grad_out"))
    if grad is not None:
        (out * grad).sum().backward()
        outputs["dx"] = x.grad
        outputs |= {f"d{key.removeprefix('router.')}": leaf.grad for key, leaf in layer.named_parameters()
                    if leaf.grad is not None}  # fmt: skip
    return outputs


def _transnext_layer(config: dict, weights: dict[str, Tensor], x: Tensor) -> tuple[nn.Module, tuple[int, int]]:
    side = round(x.shape[1] ** 0.5)
    size = config.get("resolution", (side, side))
    pretrain = config.get("pretrain_size")
    options = {
        "routing": (config["shared_head"], config["routed_head"]),
        "pretrain_side": pretrain[0] if isinstance(pretrain, list) else pretrain,
        "qkv_bias": "qkv.bias" in weights or "q.bias" in weights,
    }
    size = (size, size) if isinstance(size, int) else size
    if "qkv.weight" in weights:
        return CosineAttention(config["dim"], config["num_heads"], **options), tuple(size)
    window = config.get("window_size", 3)
    pooling = {"window": window, "sr_ratio": config.get("sr_ratio", 1)}
    pooling["fixed_pool_size"] = config.get("fixed_pool_size")
    return AggregatedAttention(config["dim"], config["num_heads"], **pooling, **options), tuple(size)


def _vit(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = ("in_chans", "num_classes", "embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "qkv_bias")
    options = {
        name: config[name] for name in (*plain, "img_size", "pretrain_size", "fixed_pool_size") if name in config
    }
    window = config.get("window_size", 3)
    options["window_size"] = next(side for side in window if side) if isinstance(window, list) else window
    shared, active = (config.get(name) for name in ("shared_head", "routed_head"))
    model = TransNeXt(**options, shared_heads=shared, active_heads=active).eval()
    load_checkpoint(model, weights, checkpoint_filter_fn)
    name = "image" if "image" in given else "x"
    grad = next((given[key] for key in ("dlogits", "dout", "grad_out") if key in given), None)
    image = given[name].requires_grad_(grad is not None)
    with collect_routing(model) as routing:
        last = model.forward_features(image)
    logits = model.forward_head(last)
    outputs = {"logits": logits, "features": model.forward_head(last, pre_logits=True)}
    outputs["aux_loss"] = routing.balance_loss()
    if grad is not None:
        (logits * grad).sum().backward()
        outputs[f"d{name}"] = image.grad
    return outputs


def _dit(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = {"input_size": "img_size", "in_channels": "in_chans", "hidden_size": "embed_dim"}
    theirs |= {"shared_head": "shared_heads", "routed_head": "active_heads", "class_dropout_prob": "class_dropout"}
    options = {ours: config[name] for name, ours in theirs.items() if name in config}
    plain = ("patch_size", "head_dim", "num_heads", "mlp_ratio", "num_classes", "learn_sigma")
    options |= {name: config[name] for name in plain if name in config}
    depth = config.get("depth", len({key.split(".")[1] for key in weights if key.startswith("blocks.")}))
    per_layer = {name: options[name] for name in ("num_heads", "shared_heads", "active_heads")}
    options |= {name: [value] * depth if isinstance(value, int) else value for name, value in per_layer.items()}
    options.setdefault("head_dim", config["hidden_size"] // options["num_heads"][0])
    model = MoHDiT(**options).eval()
    load_checkpoint(model, {"pos_embed": model.pos_embed, **weights}, moh_dit.checkpoint_filter_fn)
    x, t, y = given["x"], given["t"], given["y"]
    with collect_routing(model) as routing:
        out = model(x, t, y)
    outputs = {"out": out, "aux_loss": routing.balance_loss()}
    if "cfg_scale" in config:
        outputs["guided"] = model.guided(x, t, y, config["cfg_scale"])
    return outputs


def _language(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {name: value for name, value in config.items() if name not in _NOT_LLAMAS}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), attn_implementation="sdpa")
    model.load_state_dict(weights, strict=not config.get("tie_word_embeddings"))
    heads = config["num_attention_heads"]
    # Every case is also decoded from a cache, which has to give the same.
    tokens, split = given["input_ids"], given["input_ids"].shape[1] // 2
    with (
        MixtureOfHeads(config.get("shared_heads", heads // 2), config.get("routed_active", heads // 4))(
            model.eval()
        ) as routing,
        torch.no_grad(),
    ):
        first = model(tokens[:, :split])
        masks = [routing.head_mask()]
        rows, cache = [first.logits], returned_cache(first)
        for token in tokens[:, split:].split(1, dim=1):
            rows.append(model(token, **with_cache(model, cache)).logits)
            masks.append(routing.head_mask())
        logits = model(tokens).logits
        torch.testing.assert_close(torch.cat(rows, dim=1), logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(torch.cat(masks, dim=2), routing.head_mask())
        padding = given.get("attention_mask")
        if padding is not None and not padding.all():
            positions = given.get("position_ids", (padding.cumsum(1) - 1).clamp(min=0))
            logits = model(tokens, attention_mask=padding, position_ids=positions).logits
        return {"logits": logits, "head_mask": routing.head_mask().float()}
