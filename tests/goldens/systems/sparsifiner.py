"""Sparsifiner: predictor and model, in the authors' key layout and options."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from manyheads.layers.sparsifiner import ConnectivityPredictor
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.sparsifiner import Sparsifiner, checkpoint_filter_fn
from manyheads.ops.sparse_connectivity import PairRule, pair_index, pair_mask, sparsities
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``."""
    weights, given = tensors(state), tensors(inputs)
    return arrays((_predictor if "predictor" in config["part"] else _model)(config, weights, given))


def _rule(config: dict) -> dict[str, Any]:
    return {
        "basis_threshold": config["BASIS_THRESHOLD"],
        "coefficient_top": config["BASIS_COEF_TOPK"] if config["BASIS_COEF_USE_TOPK"] else None,
        "coefficient_threshold": config["BASIS_COEF_THRESHOLD"],
        "score_threshold": None if config["ATTN_SCORE_USE_TOPK"] else config["ATTN_SCORE_THRESHOLD"],
        "prune_rows": config["PRUNE_ATTN_MATRIX_ROW"],
    }


def _predictor(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    rule = PairRule(keep_rate=config["attn_keep_rate"], **_rule(config))
    predictor = ConnectivityPredictor(
        config["dim"] // config["num_heads"], config["num_tokens"], reduce_channels=config["reduce_c_factor"],
        reduce_tokens=config["reduce_n_factor"], share=config["share_inout_proj"], rule=rule,
    )  # fmt: skip
    load_checkpoint(predictor, weights)
    kept = next((given[name].bool() for name in ("token_mask", "policy", "mask") if name in given), None)
    whole = config.get("training", False) and config["USE_ATTN_RECON"]
    prediction = predictor(given["q"], given["k"], kept, sparse=not whole)
    mask = pair_mask(pair_index(prediction.scores, rule, token_mask=kept), config["num_tokens"])
    zeros = sparsities(prediction, mask)
    return {
        "basis_coef": prediction.coefficients, "approx_attn": prediction.scores, "attn_mask": mask.int(),
        "basis_sparsity": zeros["basis"], "basis_coef_sparsity": zeros["coefficients"],
        "attn_mask_sparsity": zeros["mask"],
    }  # fmt: skip


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    convolutional = any(name.startswith("patch_embed.conv1") for name in weights)
    model = Sparsifiner(
        img_size=config["img_size"], patch_size=config["patch_size"], num_classes=config["num_classes"],
        embed_dim=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"], qkv_bias=config["qkv_bias"], norm_eps=config["norm_eps"],
        attn_keep_rate=config["attn_keep_rate"], token_keep_rate=config["token_keep_rate_list"],
        token_pruning_loc=config["token_pruning_loc"], reduce_n_factor=config["reduce_n_factor"],
        reduce_c_factor=config["reduce_c_factor"], share_inout_proj=config["share_inout_proj"],
        stem="conv" if convolutional else "patch", aux_head=any(name.startswith("aux_head.") for name in weights),
        skip_lam=config.get("skip_lam", 2.0 if convolutional else 1.0), **_rule(config),
    ).eval()  # fmt: skip
    load_checkpoint(model, weights, checkpoint_filter_fn)
    for block in model.blocks:
        block.attn.reconstruct = config["USE_ATTN_RECON"]
    found = model.inspect(given["image"])
    zeros, first = found.sparsities(), found.layers[0]
    assert first.mask is not None
    return {
        "logits": found.logits, "features": found.features, "attn_mask_first": first.mask.int(),
        "basis_sparsity": zeros["basis"], "basis_coef_sparsity": zeros["coefficients"],
        "attn_mask_sparsity": zeros["mask"],
    }  # fmt: skip
