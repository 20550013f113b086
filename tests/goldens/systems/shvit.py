"""SHViT: the attention layer, and whole models in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.shvit import SingleHeadAttention
from manyheads.models.vision.shvit import SHViT, checkpoint_filter_fn
from tests.goldens.systems._gradients import of_backbone, with_gradients
from tests.goldens.systems._tensors import arrays, tensors, with_counters

AUTHORS = {"embed_dims": (128, 256, 384), "partial_dims": (32, 64, 96), "depths": (1, 2, 3), "types": "sss"}
RENAMED = {"embed_dim": "embed_dims", "partial_dim": "partial_dims", "qk_dim": "qk_dims", "depth": "depths"}
PLAIN = ("in_chans", "num_classes", "types", "distillation", "embed_dims", "partial_dims", "qk_dims", "depths")


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A configuration with one width is the layer, one with a width for each stage a model."""
    weights, given = tensors(state), tensors(inputs)
    return arrays(_layer(config, weights, given) if "dim" in config else _model(config, weights, given))


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    partial_dim = config.get("partial_dim", config.get("pdim"))
    layer = SingleHeadAttention(config["dim"], partial_dim, qk_dim=config.get("qk_dim") or 16)
    layer.eval().load_state_dict(with_counters(weights, layer))
    return with_gradients(lambda inputs: ({"out": layer(inputs["x"])}, dict(layer.named_parameters())), given)


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {name: config[name] for name in PLAIN if config.get(name) is not None}
    options |= {ours: config[theirs] for theirs, ours in RENAMED.items() if config.get(theirs) is not None}
    stages = len(options.get("embed_dims", AUTHORS["embed_dims"]))
    defaults = AUTHORS if stages == 3 else {}
    model = SHViT(**{**defaults, "qk_dims": (16,) * stages, **options})
    if "head_dist.l.weight" in weights and model.head_dist is None and model.num_classes:
        model = SHViT(**{**defaults, "qk_dims": (16,) * stages, **options, "distillation": True})
    return of_backbone(model, weights, checkpoint_filter_fn, given, training=bool(config.get("training")))
