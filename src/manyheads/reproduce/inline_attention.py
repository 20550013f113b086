"""InLine attention's claims: distinct queries stay distinct, locality closes the gap to softmax, time is linear."""

from __future__ import annotations

from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from manyheads.layers.inline import kernel_maker, local_residual
from manyheads.models.registry import create_model
from manyheads.ops.inline import inline_attention, inline_weights
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.clock import growth, thread_seconds
from manyheads.reproduce.digits import accuracy_on_digits, train_on_digits

EPOCHS = 8
LENGTHS = (1024, 2048, 4096, 8192, 16384)
KINDS = ("softmax", "linear", "inline")


def weight_rows(kind: str, query: Tensor, key: Tensor) -> Tensor:
    """Weights of all pairs in units of the mean weight, for softmax, ReLU-normalised linear and InLine attention."""
    if kind == "softmax":
        rows = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    else:
        rows = (
            inline_weights(query, key) if kind == "inline" else F.normalize(query.relu() @ key.relu().mT, p=1, dim=-1)
        )
    return rows * key.shape[2]


def distinct_queries_stay_distinct(seed: int) -> Finding:
    """Weights of a query and of its multiples by 2, 4 and 8, in three kinds of attention."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.rand(1, 1, 32, 16, generator=generator, dtype=torch.float64)
    key = torch.rand(1, 1, 64, 16, generator=generator, dtype=torch.float64)
    apart = {}
    for kind in KINDS:
        rows = weight_rows(kind, query, key)
        apart[kind] = min((rows - weight_rows(kind, by * query, key)).abs().amax(-1).min().item() for by in (2, 4, 8))
    distinct = apart["inline"] > 1e-2 and apart["softmax"] > 1e-2
    verdict = Verdict.CONFIRMED if distinct and apart["linear"] < 1e-6 else Verdict.REFUTED
    return Finding(apart["inline"], {kind: apart[kind] for kind in ("linear", "softmax")}, verdict)


def trained_queries_collide(seed: int) -> Finding:
    """Train the three kinds on digits and count the pairs of a layer's queries that have the same weights."""
    shares = {}
    for kind in KINDS:
        net, images, _ = train_on_digits(
            lambda kind=kind: TinyViT(kind, local=True), seed, size=8, epochs=EPOCHS, learning_rate=3e-3
        )
        shares[kind] = collisions(cast(TinyViT, net), images[:64])
    verdict = Verdict.INCONCLUSIVE
    if shares["linear"] >= 10 * shares["inline"] and shares["inline"] <= max(2 * shares["softmax"], 1e-3):
        verdict = Verdict.CONFIRMED
    elif shares["linear"] <= shares["inline"]:
        verdict = Verdict.REFUTED
    return Finding(shares["inline"], {kind: shares[kind] for kind in ("linear", "softmax")}, verdict)


def collisions(net: TinyViT, images: Tensor) -> float:
    """Share of the pairs of queries, over all layers, heads and images, whose rows of weights agree within 1e-3."""
    shares = []
    with torch.inference_mode():
        x = net.patches(images).flatten(2).mT + net.positions
        for module in net.blocks:
            block = cast(TinyViT.Block, module)
            rows = weight_rows(block.kind, *block.project(block.norm1(x))[:2])
            left, right = torch.triu_indices(rows.shape[2], rows.shape[2], 1)
            apart = torch.stack([(part[:, left] - part[:, right]).abs().amax(-1) for part in rows])
            shares.append((apart < 1e-3).float().mean().item())
            x = block(x)
    return mean(shares)


class TinyViT(nn.Module):
    """Three blocks of width 48 on single pixels, mean pooled, with one kind of attention, local term or not."""

    class Block(nn.Module):
        """Attention and MLP."""

        def __init__(self, kind: str, local: bool, dim: int = 48, heads: int = 4) -> None:
            super().__init__()
            self.kind, self.heads = kind, heads
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            self.residual = kernel_maker(dim, heads) if local else None

        def project(self, normed: Tensor) -> Tensor:
            """Query, key and value, (3, batch, heads, tokens, head_dim)."""
            return rearrange(self.qkv(normed), "b n (slot h d) -> slot b h n d", slot=3, h=self.heads)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm1(x)
            q, k, v = self.project(normed)
            if self.kind == "softmax":
                out = F.scaled_dot_product_attention(q, k, v)
            elif self.kind == "inline":
                out = inline_attention(q, k, v)
            else:
                q, k = q.relu(), k.relu()
                out = q @ (k.mT @ v) / (q @ k.sum(2)[..., None] + 1e-6)
            out = rearrange(out, "b h n d -> b n (h d)")
            if self.residual is not None:
                value = rearrange(v, "b h n d -> b n (h d)")
                out = out + local_residual(value, (8, 8), normed.mean(1), self.residual)
            x = x + self.proj(out)
            return x + self.mlp(self.norm2(x))

    def __init__(self, kind: str, local: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, 48))
        self.blocks = nn.Sequential(*(self.Block(kind, local) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def locality_helps(seed: int) -> Finding:
    """Train softmax, linear and InLine attention on digits for a few epochs, each with the local term and without."""
    scores = {
        f"{kind}{' + local' * local}": accuracy_on_digits(
            lambda kind=kind, local=local: TinyViT(kind, local), seed, size=8, epochs=EPOCHS, learning_rate=3e-3
        )
        for kind in KINDS
        for local in (False, True)
    }
    gains = [scores[f"{kind} + local"] - scores[kind] for kind in KINDS]
    verdict = Verdict.INCONCLUSIVE
    if min(gains) > 0.3:
        verdict = Verdict.CONFIRMED
    elif min(gains) <= 0:
        verdict = Verdict.REFUTED
    return Finding(mean(gains), 0.3, verdict, {"accuracy": scores, "gains": dict(zip(KINDS, gains))})


def linear_cost(seed: int) -> Finding:
    """Time the operator against SDPA for 1k to 16k tokens and fit the growth in a log-log plot."""
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[str, list[float]] = {"inline": [], "softmax": []}
    with torch.inference_mode():
        for length in LENGTHS:
            inputs: Any = [torch.randn(1, 1, length, 32, generator=generator) for _ in range(3)]
            for name, function in (("inline", inline_attention), ("softmax", F.scaled_dot_product_attention)):
                seconds[name].append(thread_seconds(lambda f=function, x=inputs: f(*x)))
    slopes = {name: growth(LENGTHS, times) for name, times in seconds.items()}
    if slopes["inline"] < 1.3 and slopes["inline"] < slopes["softmax"] - 0.3:
        verdict = Verdict.CONFIRMED
    else:
        verdict = Verdict.REFUTED if slopes["inline"] > 1.6 else Verdict.INCONCLUSIVE
    return Finding(slopes["inline"], slopes["softmax"], verdict, {"seconds": seconds, "lengths": list(LENGTHS)})


def published_sizes(seed: int) -> Finding:
    """Count the parameters of released variants; their accuracies need ImageNet."""
    paper = {"inline_deit_tiny": 6.5, "inline_pvt_tiny": 12.0, "inline_swin_tiny": 30.0, "inline_cswin_tiny": 21.0}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) / 1e6 for name in paper}
    fits = all(abs(counts[name] - size) <= 1.0 for name, size in paper.items())
    reason = "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"
    return Finding(counts, paper, Verdict.INCONCLUSIVE if fits else Verdict.REFUTED, {"reason": reason})


CLAIMS = (
    Claim(
        system="inline_attention",
        name="distinct_queries_stay_distinct",
        statement="Linear attention gives a query and its multiples the same weights; InLine attention does not.",
        rule="Random positive queries and keys, factors 2, 4 and 8, the largest difference between two rows of "
        "weights, in units of the mean weight. Confirmed when for every query it is below 1e-6 with linear attention "
        "and above 1e-2 with InLine and softmax attention; else refuted.",
        run=distinct_queries_stay_distinct,
    ),
    Claim(
        system="inline_attention",
        name="trained_queries_collide",
        statement="In a trained model, linear attention confuses far more queries than InLine or softmax attention.",
        rule="Digits of 8 x 8 pixels, a token each, width 48, 3 blocks with the local term, 8 epochs: share of the "
        "pairs of a layer's queries whose rows of weights agree within 1e-3 of the mean weight. Confirmed when linear "
        "attention's is at least ten times InLine's, and InLine's at most twice softmax attention's (or 0.1%); refuted "
        "when linear attention's is not larger than InLine's; else inconclusive.",
        run=trained_queries_collide,
    ),
    Claim(
        system="inline_attention",
        name="locality_helps",
        statement="The local residual lifts softmax, linear and InLine attention alike.",
        rule="Digits of 8 x 8 pixels, a token each, width 48, 3 blocks, 8 epochs. Confirmed when each of the three "
        "gains more than 30 points of accuracy by the local term, refuted when one of them gains nothing, else "
        "inconclusive.",
        run=locality_helps,
        full_scale="manyheads train inline_deit_tiny --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="inline_attention",
        name="linear_cost",
        statement="Its time grows linearly with the number of tokens, softmax attention's quadratically.",
        rule="Log-log slope of the CPU time of one thread, the fastest of runs lasting half a second, for 1,024 to "
        "16,384 tokens of 32 channels. Confirmed when below 1.3 and at least 0.3 below softmax attention's, refuted "
        "when above 1.6, else inconclusive.",
        run=linear_cost,
    ),
    Claim(
        system="inline_attention",
        name="published_accuracy",
        statement="74.5, 78.2, 82.4 and 83.2% top-1 on ImageNet with 6.5, 12, 30 and 21 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than a million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate inline_deit_tiny --data imagenet --checkpoint inline_deit_t.pth",
    ),
)
