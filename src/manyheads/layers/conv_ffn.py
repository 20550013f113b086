"""Feed-forward layers with a depthwise 3x3 convolution, which also tells a token what is beside it.

    convolutional FFN:  W_2 GELU( DWConv3x3( W_1 x ) )
    convolutional GLU:  W_2 ( GELU( DWConv3x3( g ) ) * u ),   (g, u) = W_1 x

Both are zero-padded convolutions with a bias between two linear maps with biases, and the exact (erf) GELU.

Sources: "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv 2106.13797 (the FFN, as in LITv2 and
SpectFormer); "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132 (the GLU).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ConvFeedForward(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, Linear, on channels-last maps.

    Args:
        dim: width of input and output.
        hidden: width between the linear maps.

    Shape: (batch, X, Y, dim), returned as it came.

    Source: "PVT v2", arXiv 2106.13797.

    >>> import torch
    >>> ConvFeedForward(8, 32)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        return self.fc2(F.gelu(_on_channels_last(self.dwconv, self.fc1(x))))


class ConvGLU(nn.Module):
    """Convolutional gated linear unit: the gate of a channel looks at the 3 x 3 neighbourhood, on channels-last maps.

    Args:
        dim: width of input and output.
        hidden: width of the gate and of the value; two thirds of an FFN's hidden width make both equally large.

    Shape: (batch, X, Y, dim), returned as it came.

    Source: "TransNeXt", arXiv 2311.17132, section 3.4.

    >>> import torch
    >>> ConvGLU(8, 21)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.gelu(_on_channels_last(self.dwconv, gate)) * value)


def initialise_convolution(convolution: nn.Conv2d) -> None:
    """Normal weights with variance 2 / fan_out and zero bias, as pyramid transformers begin.

    >>> layer = nn.Conv2d(64, 64, 3, groups=64)
    >>> initialise_convolution(layer)
    >>> bool(0.4 < layer.weight.std() < 0.54), layer.bias.abs().sum().item()
    (True, 0.0)
    """
    rows, columns = convolution.kernel_size
    fan_out = rows * columns * convolution.out_channels // convolution.groups
    nn.init.normal_(convolution.weight, std=(2 / fan_out) ** 0.5)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def _on_channels_last(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
