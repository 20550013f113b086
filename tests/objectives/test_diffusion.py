"""The diffusion loss against torch's distributions and diffusers' schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from manyheads.objectives.diffusion import diffusion_loss


def _by_hand(x, noise, t: int, predicted, spread, steps: int) -> torch.Tensor:
    """One sample, from the definitions of q and p."""
    beta = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.double)
    kept = torch.stack([(1 - beta[: i + 1]).prod() for i in range(steps)])
    noisy = kept[t].sqrt() * x + (1 - kept[t]).sqrt() * noise
    before = kept[t - 1] if t else torch.tensor(1.0, dtype=torch.double)
    variance = [beta[i] * (1 - kept[i - 1]) / (1 - kept[i]) for i in range(1, steps)]
    fixed = variance[t - 1] if t else variance[0]

    def mean(clean):
        return (before.sqrt() * beta[t] * clean + (1 - beta[t]).sqrt() * (1 - before) * noisy) / (1 - kept[t])

    clean = (noisy - (1 - kept[t]).sqrt() * predicted) / kept[t].sqrt()
    share = (spread + 1) / 2
    learnt = Normal(mean(clean), (0.5 * (share * beta[t].log() + (1 - share) * fixed.log())).exp())
    if t:
        bits = kl_divergence(Normal(mean(x), fixed.sqrt().expand_as(x)), learnt) / math.log(2)
    else:
        bits = -(learnt.cdf(x + 1 / 255) - learnt.cdf(x - 1 / 255)).clamp(min=1e-12).log2()
    return (noise - predicted).square().mean() + bits.mean()


@pytest.mark.parametrize("t", [0, 1, 7, 19])
def test_the_loss_is_the_squared_error_and_the_divergence(t: int) -> None:
    x, noise, predicted, spread = (torch.rand(1, 2, 3, 3, dtype=torch.double) * 0.5 for _ in range(4))
    seen = []

    def model(noisy, step, labels):
        seen.append((noisy, step, labels))
        return torch.cat([predicted, spread], dim=1)

    loss = diffusion_loss(model, x, torch.tensor([4]), steps=20, t=torch.tensor([t]), noise=noise)
    torch.testing.assert_close(loss, _by_hand(x, noise, t, predicted, spread, 20))
    assert (seen[0][1].item(), seen[0][2].item()) == (t, 4)


def test_noise_is_added_as_diffusers_does() -> None:
    from diffusers import DDPMScheduler

    x, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    seen = []
    diffusion_loss(lambda noisy, *_: seen.append(noisy) or torch.cat([noisy, noisy], 1), x, t, t=t, noise=noise)
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").add_noise(x, noise, t)
    torch.testing.assert_close(seen[0], theirs, rtol=1e-4, atol=1e-4)


def test_variances_learn_from_the_divergence_alone_and_noise_from_the_error_alone() -> None:
    x, noise = torch.rand(4, 1, 2, 2, dtype=torch.double), torch.randn(4, 1, 2, 2, dtype=torch.double)
    out = torch.randn(4, 2, 2, 2, dtype=torch.double, requires_grad=True)
    diffusion_loss(lambda *_: out, x, torch.zeros(4).long(), t=torch.tensor([0, 3, 400, 999]), noise=noise).backward()
    torch.testing.assert_close(out.grad[:, :1], 2 * (out - noise)[:, :1].detach() / 16)
    assert (out.grad[:, 1:].abs() > 0).any()


def test_steps_and_noise_are_drawn() -> None:
    seen = []
    diffusion_loss(
        lambda noisy, t, y: seen.append(t) or torch.zeros(64, 2, 1, 1), torch.zeros(64, 1, 1, 1), torch.zeros(64).long()
    )
    assert seen[0].min() >= 0
    assert 500 < seen[0].max() < 1000


def test_bad_input() -> None:
    x, y = torch.zeros(1, 3, 2, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="steps=1 must be at least 2"):
        diffusion_loss(lambda *_: x, x, y, steps=1)
    with pytest.raises(ValueError, match=r"must return 6 channels \(noise, variances\), got 3"):
        diffusion_loss(lambda *_: x, x, y)
