"""What timm asks of every backbone made of stages, written once.

A model that derives from ``Backbone`` sets ``in_chans``, ``num_classes``, ``num_features``, ``feature_info`` and
``head`` and keeps its stages under ``stages_name``. A stage maps its input to the next stage's input; where the map to
keep is another one (before the downsampling that ends the stage), it returns the pair (map to keep, next stage's
input). What a model replaces: ``embed`` and ``finish`` and, where its head is not mean, dropout, Linear, the three
methods about the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.models.vision.features import check_image, stage_indices


class Backbone(nn.Module):
    """An image classifier and feature extractor made of stages; the module's docstring says what a model adds."""

    stages_name = "stages"
    channels_last = False  # whether stages hand on (batch, X, Y, channels)
    downsamples_last = False  # whether a stage ends with its ``downsample`` (and returns pairs)
    in_chans: int
    num_classes: int
    num_features: int
    drop_rate: int | float = 0.0

    def embed(self, image: Tensor) -> Tensor:
        """What the first stage reads."""
        return image

    def finish(self, x: Tensor) -> Tensor:
        """What stands between the last stage and the pooling."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map with the final norm (where there is one before the pooling)."""
        check_image(x, self.in_chans)
        x = self.embed(x)
        for stage in self._stages():
            _, x = _both(stage(x))
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over positions, then classify; ``pre_logits`` stops before the classifier."""
        pooled = F.dropout(x.mean((1, 2) if self.channels_last else (2, 3)), self.drop_rate, self.training)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (batch, channels, X, Y) of the stages ``indices``: all for None, the last n for an int.

        Args:
            x: images (batch, in_chans, height, width).
            indices: which stages.
            norm: apply the model's final norm to the last stage's map, if that is one of them.
            stop_early: run no stage after the last one wanted.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone, not the pair (final map, maps).
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        check_image(x, self.in_chans)
        stages = self._stages()
        wanted = stage_indices(len(stages), indices)
        last = len(stages) - 1
        x, maps = self.embed(x), []
        for index, stage in enumerate(stages[: max(wanted) + 1] if stop_early else stages):
            kept, x = _both(stage(x))
            x = self.finish(x) if index == last else x
            if index in wanted:
                kept = x if norm and index == last else kept
                maps.append(kept.permute(0, 3, 1, 2) if self.channels_last else kept)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, and the parts that only the classifier needs."""
        wanted = stage_indices(len(self._stages()), indices)
        setattr(self, self.stages_name, self._stages()[: max(wanted) + 1])
        if self.downsamples_last:
            setattr(self._stages()[-1], "downsample", None)  # noqa: B010
        if prune_norm and hasattr(self, "norm"):
            self.norm = nn.Identity()
        if prune_head:
            self.head = nn.Identity()
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                setattr(module, "grad_checkpointing", enable)  # noqa: B010

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.get_submodule("head")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width; the pooling is always the mean."""
        check_choice("global_pool", global_pool or "avg", ("avg",))
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(next(self._stages().parameters()).device)

    def _stages(self) -> nn.ModuleList | nn.Sequential:
        return getattr(self, self.stages_name)


def _both(result: Tensor | tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """(map to keep, next stage's input, which may be more than a map)"""
    return result if isinstance(result, tuple) else (result, result)
