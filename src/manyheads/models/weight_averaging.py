"""The exponential moving average of the weights, by which many published vision models are judged.

After every step ``average = decay * average + (1 - decay) * weights``; timm keeps it, this file lets the trainer judge
by it, save it beside a checkpoint and go on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback

from manyheads.models.checkpoints import load_checkpoint, save_checkpoint

AVERAGED = "averaged.safetensors"


class AveragedWeights(TrainerCallback):
    """Average the weights (and buffers) of ``network`` while it trains.

    Args:
        network: what is trained.
        decay: share of the old average that a step keeps; 0 keeps no average, and everything here does nothing.
        resume: the checkpoint directory that the training goes on from, or None.
    """

    def __init__(self, network: nn.Module, decay: float, resume: Path | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} must be in [0, 1)")
        self.network, self.decay, self.resume = network, decay, resume
        self.average: ModelEmaV3 | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not before: only now do the weights stand on their device.
        if self.decay:
            self.average = ModelEmaV3(self.network, decay=self.decay)
            if self.resume is not None:
                load_checkpoint(self.average.module, self.resume / AVERAGED)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.average is not None:
            self.average.update(self.network)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.average is not None and state.is_world_process_zero:
            save_checkpoint(self.average.module, Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGED)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Inside the ``with`` block the network has its averaged weights, where there are any."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.average is None:
            return
        for mine, other in zip(self.network.state_dict().values(), self.average.module.state_dict().values()):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
