"""Dynamic Perceiver's four classifiers, and the units that hand on the logits of one to the next.

    exit 1   y_1 = Linear(mean Z_3)                       exit 3   y_3 = C(mean x)
    exit 2   y_2 = Linear([mean Z_4, g(y_1)])             exit 4   y_4 = C(BN([mean write(x, Z), mean Z_4, g'(y_2)]))
    g(y) = ReLU(BN(Linear(y)))                            C = Linear, or Linear, Hardswish, dropout, Linear

Without forward knowledge transfer g and g' are left away.

Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, sections 3.2 and 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXITS = 4


class Exits(nn.Module):
    """The four classifiers and the two units that hand on logits.

    Args:
        classes: width of the logits.
        cnn_classes: width of exit 3.
        dims: channels of Z_3, of Z_4 and of the last map.
        hidden: width of a hidden layer with Hardswish in exits 3 and 4; 0 has none.
        drop_rate: dropout, of the hidden layer or else of the features of exits 3 and 4.
        transfer: forward knowledge transfer.
    """

    def __init__(
        self,
        classes: int,
        cnn_classes: int,
        dims: tuple[int, int, int],
        hidden: int,
        drop_rate: int | float,
        transfer: bool,
    ) -> None:
        super().__init__()
        third, fourth, last = dims
        self.feature_drop = 0.0 if hidden else drop_rate

        def hand_on() -> nn.Module | None:
            return nn.Sequential(nn.Linear(classes, fourth), nn.BatchNorm1d(fourth), nn.ReLU()) if transfer else None

        def classify(dim: int, classes: int) -> list[nn.Module]:
            if not hidden:
                return [nn.Linear(dim, classes)]
            return [nn.Linear(dim, hidden), nn.Hardswish(), nn.Dropout(drop_rate), nn.Linear(hidden, classes)]

        self.transfer3, self.transfer4 = hand_on(), hand_on()
        self.early = nn.Linear(third, classes)
        self.latent = nn.Linear(fourth * (1 + transfer), classes)
        cnn = classify(last, cnn_classes)
        self.cnn = nn.Sequential(*cnn) if hidden else cnn[0]
        merged = last + fourth * (1 + transfer)
        self.merge = nn.Sequential(nn.BatchNorm1d(merged), *classify(merged, classes))

    def read_first(self, z: Tensor) -> Tensor:
        """Exit 1, from the latents."""
        return self.early(z.mean(1))

    def read_latents(self, z: Tensor, hint: Tensor) -> Tensor:
        """Exit 2, from the latents and the logits of exit 1."""
        return self.latent(joined([z.mean(1)], self.transfer3, hint))

    def read_map(self, x: Tensor) -> Tensor:
        """Exit 3, from the map."""
        return self.cnn(F.dropout(x.mean((2, 3)), self.feature_drop, self.training))

    def read_all(self, features: Tensor) -> Tensor:
        """Exit 4, from what ``joined`` makes of map, latents and the logits of exit 2."""
        return self.merge(F.dropout(features, self.feature_drop, self.training))


def joined(features: list[Tensor], transfer: nn.Module | None, hint: Tensor | None) -> Tensor:
    """Features side by side, and behind them what is handed on of the logits ``hint``."""
    return torch.cat(features if transfer is None or hint is None else [*features, transfer(hint)], dim=1)
