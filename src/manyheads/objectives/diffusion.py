"""The loss that diffusion transformers with learned variances are trained by.

With betas rising linearly from 1e-4 to 0.02 over T steps, a_t the running product of 1 - beta, and noise e::

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e
    L = |e - e'(x_t)|^2 + KL( q(x_{t-1} | x_t, x_0)  ||  p(x_{t-1} | x_t) ),     in the KL e' is held fixed
    log variance of p = f log beta_t + (1 - f) log beta~_t,     f = (v'(x_t) + 1) / 2

beta~_t being the variance of q. At t = 0 the KL is the negative log-likelihood of x_0 in bins of 1/127.5. KL and
likelihood are in bits, averaged over the values of a sample.

Source: "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, as used by "Scalable Diffusion Models
with Transformers", arXiv 2212.09748 (whose code approximates the normal distribution that is exact here).
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

FIRST_BETA, LAST_BETA = 1e-4, 0.02
BIN = 1 / 255


def diffusion_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "batch channels height width"],
    labels: Tensor,
    *,
    steps: int = 1000,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The mean training loss of a batch; add the load-balancing loss of MoH-DiT to it.

    Args:
        model: called as ``model(x_t, t, labels)``; returns noise and, after it, as many channels of variances.
        x: clean images or latents, scaled to about [-1, 1] (latents of Stable Diffusion's encoder times 0.18215).
        labels: (batch,) classes.
        steps: T.
        t: (batch,) steps from 0 to T - 1; None draws them evenly.
        noise: e, shaped like x; None draws it.

    Raises:
        ValueError: fewer than 2 steps, a model that does not return twice the channels.

    Source: arXiv 2102.09672, sections 3.1 and 3.2.

    >>> import torch
    >>> from manyheads.layers import collect_routing
    >>> from manyheads.models.moh_dit import MoHDiT
    >>> model = MoHDiT(img_size=8, embed_dim=32, head_dim=8, num_heads=(4,), shared_heads=(2,), active_heads=(1,))
    >>> with collect_routing(model) as routing:
    ...     loss = diffusion_loss(model, torch.randn(2, 4, 8, 8), torch.tensor([3, 8]))
    >>> (loss + 0.01 * routing.balance_loss()).shape
    torch.Size([])
    """
    if steps < 2:
        raise ValueError(f"steps={steps} must be at least 2")
    t = torch.randint(steps, x.shape[:1], device=x.device) if t is None else t
    noise = torch.randn_like(x) if noise is None else noise
    beta = torch.linspace(
        FIRST_BETA * 1000 / steps, LAST_BETA * 1000 / steps, steps, device=x.device, dtype=torch.float64
    )
    kept = (1 - beta).cumprod(0)
    kept_before = torch.cat([kept.new_ones(1), kept[:-1]])
    variance = beta * (1 - kept_before) / (1 - kept)
    # The first step's variance is 0: its logarithm is that of the second.
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()

    def at(table: Tensor) -> Tensor:
        return table[t].to(x.dtype)[:, None, None, None]

    noisy = at(kept.sqrt()) * x + at((1 - kept).sqrt()) * noise
    out = model(noisy, t, labels)
    if out.shape[1] != 2 * x.shape[1]:
        raise ValueError(f"the model must return {2 * x.shape[1]} channels (noise, variances), got {out.shape[1]}")
    predicted, spread = out.chunk(2, dim=1)
    share = (spread + 1) / 2
    log_predicted = share * at(beta.log()) + (1 - share) * at(log_variance)
    guess = (noisy - at((1 - kept).sqrt()) * predicted.detach()) / at(kept.sqrt())
    from_clean = at(beta * kept_before.sqrt() / (1 - kept))
    from_noisy = at((1 - kept_before) * (1 - beta).sqrt() / (1 - kept))
    mean, predicted_mean = from_clean * x + from_noisy * noisy, from_clean * guess + from_noisy * noisy
    apart = _gaussian_divergence(mean, at(log_variance), predicted_mean, log_predicted)
    first = -_log_likelihood_of_bins(x, predicted_mean, 0.5 * log_predicted)
    bits = torch.where(t == 0, first.mean((1, 2, 3)), apart.mean((1, 2, 3))) / log(2)
    return ((noise - predicted).square().mean((1, 2, 3)) + bits).mean()


def _gaussian_divergence(mean: Tensor, log_variance: Tensor, other: Tensor, other_log_variance: Tensor) -> Tensor:
    ratio = (log_variance - other_log_variance).exp()
    return 0.5 * (other_log_variance - log_variance - 1 + ratio + (mean - other).square() / other_log_variance.exp())


def _log_likelihood_of_bins(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log of the probability that a normal variable falls into the bin of x; the outermost bins are open."""
    upper, lower = (
        torch.special.ndtr((x - mean + side) * (-log_deviation).exp()).clamp(1e-12, 1) for side in (BIN, -BIN)
    )
    inner = (upper - lower).clamp(min=1e-12)
    return torch.where(x < -0.999, upper, torch.where(x > 0.999, (1 - lower).clamp(min=1e-12), inner)).log()
