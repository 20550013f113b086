"""Sparsifiner: predictor, attention layer and model, in the authors' key layout and options."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from manyheads.layers.sparsifiner import AttentionDetails, ConnectivityPredictor, SparsifiedAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.sparsifiner import Sparsifiner, checkpoint_filter_fn
from manyheads.ops.sparse_connectivity import PairRule, pair_index, pair_mask, sparsities
from tests.goldens.systems._gradients import Computed, with_gradients
from tests.goldens.systems._tensors import arrays, tensors, with_counters


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A predictor by its queries and keys, a model by its images, else a layer."""
    weights, given = tensors(state), tensors(inputs)
    compute = _predictor if "q" in given else _model if "image" in given else _layer
    return arrays(with_gradients(lambda given: compute(config, weights, given), given))


def _option(config: dict, name: str, default: Any) -> Any:
    """Of the authors' configuration, whose sections are part of the names or left away."""
    return next((config[key] for key in (name, name.lower()) if key in config), default)


def _rule(config: dict) -> dict[str, Any]:
    top = _option(config, "BASIS_COEF_TOPK", 8) if _option(config, "BASIS_COEF_USE_TOPK", True) else None
    threshold = None if _option(config, "ATTN_SCORE_USE_TOPK", True) else _option(config, "ATTN_SCORE_THRESHOLD", None)
    return {
        "basis_threshold": _option(config, "BASIS_THRESHOLD", 0.02),
        "coefficient_top": top,
        "coefficient_threshold": _option(config, "BASIS_COEF_THRESHOLD", 0.05),
        "score_threshold": threshold,
        "prune_rows": bool(_option(config, "PRUNE_ATTN_MATRIX_ROW", False)),
    }


def _reconstructs(config: dict) -> bool:
    return bool(_option(config, "USE_ATTN_RECON", False))


def _token_mask(given: dict[str, Tensor], patches: int) -> Tensor | None:
    """(batch, patches) from a mask with or without the class token, with or without a last axis of one."""
    mask = next((value for name, value in given.items() if "mask" in name or "policy" in name), None)
    return None if mask is None else mask.bool().flatten(1)[:, -patches:]


def _with_predictor(config: dict, head_dim: int, tokens: int, rule: PairRule) -> ConnectivityPredictor:
    return ConnectivityPredictor(
        head_dim, tokens, reduce_channels=config.get("reduce_c_factor", 2),
        reduce_tokens=config.get("reduce_n_factor", 6), share=config.get("share_inout_proj", False), rule=rule,
    )  # fmt: skip


def _predictor(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    query, key = given["q"], given["k"]
    rule = PairRule(keep_rate=config.get("attn_keep_rate", 0.25), **_rule(config))
    predictor = _with_predictor(config, query.shape[3], query.shape[2], rule)
    load_checkpoint(predictor, weights)
    kept = _token_mask(given, query.shape[2] - 1)
    whole = config.get("training", False) and _reconstructs(config)
    prediction = predictor(query, key, kept, sparse=not whole)
    # The authors read the number of kept tokens off the first image.
    count = None if kept is None else int(kept[0].sum())
    mask = pair_mask(pair_index(prediction.scores, rule, token_mask=kept, kept=count), query.shape[2])
    zeros = sparsities(prediction, mask)
    outputs = {
        "approx_attn": prediction.scores, "basis_coef": prediction.coefficients, "attn_mask": mask.int(),
        "basis": prediction.basis, "basis_sparsity": zeros["basis"], "basis_coef_sparsity": zeros["coefficients"],
        "attn_mask_sparsity": zeros["mask"],
    }  # fmt: skip
    return outputs, dict(predictor.named_parameters(remove_duplicate=False))


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    x, heads = given["x"], config["num_heads"]
    width, tokens = x.shape[2] // heads, x.shape[1]
    predictor = None
    if any(name.startswith("mask_predictor.") for name in weights):
        rule = PairRule(keep_rate=config.get("attn_keep_rate", 0.25), **_rule(config))
        predictor = _with_predictor(config, width, tokens, rule)
    pruned = config.get("token_keep_rate", 1.0) if config.get("token_pruning_this_layer", True) else 1.0
    layer = SparsifiedAttention(
        x.shape[2], heads, predictor, token_keep_rate=pruned, qkv_bias="qkv.bias" in weights
    ).train(bool(config.get("training", False)))  # fmt: skip
    load_checkpoint(layer, weights)
    layer.reconstruct = _reconstructs(config)
    mask = _token_mask(given, tokens - 1)
    out, _, found = layer.attend(x, mask, None if mask is None else int(mask[0].sum()), details=True)
    assert found is not None
    return {"out": out, "x": out, "y": out, **_details(found)}, dict(layer.named_parameters(remove_duplicate=False))


def _details(found: AttentionDetails) -> dict[str, Tensor]:
    outputs = {"masked_attn": found.masked, "unmasked_attn": found.unmasked}
    if found.prediction is not None and found.mask is not None:
        outputs |= {"basis_coef": found.prediction.coefficients, "approx_attn": found.prediction.scores}
        outputs["attn_mask"] = found.mask.int()
    if found.token_mask is not None:
        outputs["token_mask"] = found.token_mask.int()
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    convolutional = any(name.startswith("patch_embed.conv1") for name in weights)
    options = {
        "img_size": tuple(given["image"].shape[2:]), "patch_size": 16, "embed_dim": weights["cls_token"].shape[2],
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), "num_heads": 6,
        "mlp_ratio": len(weights["blocks.0.mlp.fc1.bias"]) / weights["cls_token"].shape[2],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights, "norm_eps": 1e-5 if convolutional else 1e-6,
        "num_classes": len(weights["head.bias"]), "skip_lam": 2.0 if convolutional else 1.0, "attn_keep_rate": 0.25,
        "token_pruning_loc": (), "reduce_n_factor": 6, "reduce_c_factor": 2, "share_inout_proj": False,
    }  # fmt: skip
    options |= {name: value for name, value in config.items() if name in options and value is not None}
    model = Sparsifiner(
        in_chans=given["image"].shape[1], token_keep_rate=config.get("token_keep_rate_list", 1.0),
        stem="conv" if convolutional else "patch", aux_head=any(name.startswith("aux_head.") for name in weights),
        sparse=any("mask_predictor" in name for name in weights), **options, **_rule(config),
    ).train(bool(config.get("training", False)))  # fmt: skip
    load_checkpoint(model, with_counters(weights, model), checkpoint_filter_fn)
    for block in model.blocks:
        block.attn.reconstruct = _reconstructs(config)
    found = model.inspect(given["image"])
    zeros, names = found.sparsities(), {"basis": "basis", "coefficients": "basis_coef", "mask": "attn_mask"}
    outputs = {"logits": found.logits, "features": found.features}
    outputs |= {f"{names[name]}_sparsity": value for name, value in zeros.items()}
    places = {f"_{index}": layer for index, layer in enumerate(found.layers)}
    for place, layer in {**places, "_first": found.layers[0], "_last": found.layers[-1], "": found.layers[-1]}.items():
        outputs |= {f"{name}{place}": value for name, value in _details(layer).items()}
    return outputs, dict(model.named_parameters(remove_duplicate=False))
