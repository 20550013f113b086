"""Agent attention's claims: as good as softmax, linear in the tokens, near rank-m attention, harmless in diffusion."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.adapt.agent_diffusion import AgentDiffusion
from manyheads.data.images import photos
from manyheads.models.registry import create_model
from manyheads.models.vision.hosts import HostDeiT
from manyheads.ops.agent import agent_attention
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.clock import growth, thread_seconds
from manyheads.reproduce.digits import accuracy_on_digits

SEEDS = 3
EPOCHS = 5
LENGTHS = (1024, 2048, 4096, 8192, 16384)


class MeanPooled(nn.Module):
    """A tiny DeiT with this many mixed blocks; ``local`` False takes the diversity convolution away."""

    def __init__(self, mixed: int, local: bool = True) -> None:
        super().__init__()
        self.net = HostDeiT(
            "agent", img_size=32, patch_size=4, num_classes=10, embed_dim=48, depth=3, num_heads=3, mixed=mixed,
            agent_num=9, mlp_ratio=2,
        )  # fmt: skip
        if not local:
            for name, parameter in self.net.named_parameters():
                if ".dwc." in name:
                    nn.init.zeros_(parameter)
                    parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.net.forward_features(images)
        return self.net.head(tokens[:, 1:].mean(1))


def as_good_as_softmax(seed: int) -> Finding:
    """Train agent attention, agent attention without its convolution, and softmax attention on digits."""
    builds = {"agent": (3, True), "no convolution": (3, False), "softmax": (0, True)}
    scores = {
        name: [
            accuracy_on_digits(lambda a=arguments: MeanPooled(*a), SEEDS * seed + run, epochs=EPOCHS)
            for run in range(SEEDS)
        ]
        for name, arguments in builds.items()
    }
    means = {name: mean(values) for name, values in scores.items()}
    keeps_up, helps = means["agent"] >= means["softmax"] - 0.01, means["agent"] > means["no convolution"]
    verdict = Verdict.CONFIRMED if keeps_up and helps else Verdict.INCONCLUSIVE if keeps_up else Verdict.REFUTED
    baseline = {name: round(means[name], 4) for name in ("softmax", "no convolution")}
    return Finding(round(means["agent"], 4), baseline, verdict, {"per_seed": scores})


def linear_cost(seed: int) -> Finding:
    """Time the operator against SDPA for 1k to 16k tokens, 49 agents, and fit the growth in a log-log plot."""
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[str, list[float]] = {"agent": [], "softmax": []}
    with torch.inference_mode():
        for length in LENGTHS:
            q, k, v = (torch.randn(1, 1, length, 32, generator=generator) for _ in range(3))
            agents = F.adaptive_avg_pool1d(q[0].mT, 49).mT[None]
            seconds["agent"].append(thread_seconds(lambda q=q, k=k, v=v, a=agents: agent_attention(q, k, v, a)))
            seconds["softmax"].append(thread_seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)))
    slopes = {name: growth(LENGTHS, times) for name, times in seconds.items()}
    if slopes["agent"] < 1.3 and slopes["agent"] < slopes["softmax"] - 0.3:
        verdict = Verdict.CONFIRMED
    else:
        verdict = Verdict.REFUTED if slopes["agent"] > 1.6 else Verdict.INCONCLUSIVE
    return Finding(slopes["agent"], slopes["softmax"], verdict, {"seconds": seconds, "lengths": list(LENGTHS)})


def more_agents_are_closer(seed: int) -> Finding:
    """Relative error of agent against softmax attention on patches of photographs, for more and more agents."""
    errors: dict[int, list[float]] = {side * side: [] for side in (2, 4, 7, 14, 28)}
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3 * 64, 32, generator=generator) / 8
    for photo in photos().values():
        image = F.interpolate(photo[None].float() / 255, size=(224, 224), mode="bilinear", antialias=True)
        features = F.unfold(image, 8, stride=8).mT @ mixing
        tokens = (features - features.mean(1, keepdim=True)) / features.std()
        query = 2 * tokens[:, None]
        exact = F.scaled_dot_product_attention(query, query, tokens[:, None])
        for agents in errors:
            side = round(agents**0.5)
            pooled = F.adaptive_avg_pool2d(query[:, 0].mT.unflatten(2, (28, 28)), side).flatten(2).mT[:, None]
            out = agent_attention(query, query, tokens[:, None], pooled)
            errors[agents].append(((out - exact).norm() / exact.norm()).item())
    means = [mean(values) for values in errors.values()]
    falls = all(after < before for before, after in pairwise(means))
    flat = means[-1] > 0.9 * means[0]
    verdict = Verdict.CONFIRMED if falls else Verdict.REFUTED if flat else Verdict.INCONCLUSIVE
    per_count = {str(agents): value for agents, value in zip(errors, means)}
    return Finding(means[-1], means[0], verdict, {"relative_error": per_count})


def diffusion_without_training(seed: int) -> Finding:
    """A small U-Net of diffusers on a map of 64 x 64: time of a step with agents and without, exactness at ratio 0."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        unet = small_unet()
        sample, text = torch.randn(2, 4, 64, 64), torch.randn(2, 8, 32)
        step = lambda: unet(sample, 500, encoder_hidden_states=text).sample  # noqa: E731
        plain = step()
        with AgentDiffusion(ratio=0.0, agent_ratio=0.0)(unet):
            untouched = bool(torch.equal(step(), plain))
        with AgentDiffusion.published(0.1)(unet):
            changed = not torch.equal(step(), plain)
        restored = bool(torch.equal(step(), plain))
        seconds = {"plain": thread_seconds(step, repeats=3)}
        for name, setting in (("agents", AgentDiffusion(0.1, 0.95, (4, 4))), ("merging", AgentDiffusion(0.1, 0.0))):
            with setting(unet):
                seconds[name] = thread_seconds(step, repeats=3)
    faster = seconds["agents"] < seconds["plain"]
    verdict = Verdict.CONFIRMED if faster and untouched and changed and restored else Verdict.REFUTED
    details = {"seconds": seconds, "exact_at_ratio_0": untouched, "exact_after_detaching": restored}
    return Finding(seconds["agents"], seconds["plain"], verdict, details)


def small_unet() -> nn.Module:
    """Stable Diffusion's U-Net with two resolutions, a layer each and fewer channels, randomly initialised.

    Raises:
        ImportError: diffusers is not installed (``pip install manyheads[diffusion]``).
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(64, 128), layers_per_block=1, attention_head_dim=2, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def published_sizes(seed: int) -> Finding:
    """Count the parameters of released variants; their accuracies need ImageNet."""
    paper = {"agent_deit_tiny": 6.0, "agent_pvt_small": 20.6, "agent_swin_tiny": 29.0, "agent_cswin_tiny": 21.0}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) / 1e6 for name in paper}
    fits = all(abs(counts[name] - size) <= 0.55 for name, size in paper.items())
    reason = "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"
    return Finding(counts, paper, Verdict.INCONCLUSIVE if fits else Verdict.REFUTED, {"reason": reason})


CLAIMS = (
    Claim(
        system="agent_attention",
        name="as_good_as_softmax",
        statement="Agent attention classifies at least as well as softmax attention, and its convolution helps.",
        rule="Digits of 32 x 32 pixels, patches of 4, width 48, 3 blocks, 9 agents, 5 epochs, mean over 3 seeds. "
        "Refuted when agent attention is more than one point below softmax attention; else confirmed when it is also "
        "better than without its depthwise convolution, inconclusive when not.",
        run=as_good_as_softmax,
        full_scale="manyheads train agent_deit_tiny --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="agent_attention",
        name="linear_cost",
        statement="Its time grows linearly with the number of tokens, softmax attention's quadratically.",
        rule="Log-log slope of the CPU time of one thread, the fastest of runs lasting half a second, for 1,024 to "
        "16,384 tokens, 32 channels, 49 agents. Confirmed when below 1.3 and at least 0.3 below softmax attention's, "
        "refuted when above 1.6, else inconclusive.",
        run=linear_cost,
    ),
    Claim(
        system="agent_attention",
        name="more_agents_are_closer",
        statement="Agent attention is an approximation of softmax attention that more agents make better.",
        rule="Patches of photographs, 28 x 28 tokens: relative error of the output for 4 to 784 agents. Confirmed when "
        "it falls at every step, refuted when it falls by less than a tenth in all, else inconclusive.",
        run=more_agents_are_closer,
    ),
    Claim(
        system="agent_attention",
        name="diffusion_without_training",
        statement="Put into Stable Diffusion without training, agent attention makes a step faster.",
        rule="A small U-Net of diffusers with random weights on a map of 64 x 64, two samples, ratio 0.1, CPU time of "
        "one thread. Confirmed when a step with agents is faster than without and its result another one, but "
        "unchanged bit for bit at ratio 0 and after detaching; else refuted.",
        run=diffusion_without_training,
    ),
    Claim(
        system="agent_attention",
        name="published_accuracy",
        statement="74.9, 82.2, 82.6 and 83.1% top-1 on ImageNet with 6.0, 20.6, 29 and 21 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.55 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate agent_deit_tiny --data imagenet --checkpoint agent_deit_t.pth",
    ),
)
