"""The claims of "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from statistics import mean, stdev
from typing import Any, cast

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manyheads.adapt.mixture_of_heads import MixtureOfHeads
from manyheads.data.images import digits
from manyheads.data.language_models import load_language_model
from manyheads.data.text import documentation_split
from manyheads.interpret.attach import attention_layers, geometry, head_outputs
from manyheads.layers.mixture_of_heads import MixtureOfHeadsAttention, collect_routing
from manyheads.models import create_model
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy, train_on_digits

WIDTH, HEADS, BLOCKS, SEEDS = 64, 8, 4, 3
TRAINING: dict[str, Any] = {"size": 8, "epochs": 10, "batch": 128, "learning_rate": 4e-3}
# (shared, active) of 8 heads
THREE_QUARTERS, HALF = (2, 4), (2, 2)
SMOLLM_HEADS = MixtureOfHeads(shared=4, active=2)
# Sized for two minutes: the paper tunes on billions of tokens, here only the attention layers learn.
STEPS, TOKENS, TEST_TOKENS, RATE = 60, 32, 512, 1e-4


def query_norms_choose_well(seed: int) -> Finding:
    """Loss of SmolLM2 with 6 of 9 heads, chosen by query norms and at random, and after tuning with the former."""
    model, tokenizer = load_language_model("smollm2", dtype="float32")
    train, test = (
        torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long) for text in documentation_split()
    )
    test = test[:TEST_TOKENS].view(-1, 256)
    losses = {"dense": _loss(model, test)}
    with SMOLLM_HEADS(model):
        losses["query_norm"] = _loss(model, test)
    with _random_heads(model, seed):
        losses["random"] = _loss(model, test)
    for name, choice in (("dense_tuned", None), ("query_norm_tuned", SMOLLM_HEADS)):
        tuned = copy.deepcopy(model)
        losses[name] = _tuned_loss(tuned, choice, train, test, seed)
    gap, tuned_gap = losses["query_norm"] - losses["dense"], losses["query_norm_tuned"] - losses["dense_tuned"]
    if losses["query_norm"] >= losses["random"]:
        verdict = Verdict.REFUTED
    else:
        verdict = Verdict.CONFIRMED if tuned_gap < gap / 2 else Verdict.INCONCLUSIVE
    return Finding(
        {"gap": gap, "tuned_gap": tuned_gap}, {"random": losses["random"] - losses["dense"]}, verdict, losses
    )


def fewer_heads_suffice(seed: int) -> Finding:
    """Accuracy on digits of a ViT with 8 heads, all of them, 6 of 8 and 4 of 8 for each token."""
    scores = {
        name: [_train(choice, SEEDS * seed + run)[0] for run in range(SEEDS)]
        for name, choice in (("all", None), ("75 %", THREE_QUARTERS), ("50 %", HALF))
    }
    means = {name: mean(values) for name, values in scores.items()}
    spread = mean(stdev(values) ** 2 for values in scores.values()) ** 0.5
    if means["75 %"] < means["all"] - 0.01:
        verdict = Verdict.REFUTED
    else:
        close = all(means[name] > means["all"] - spread for name in ("75 %", "50 %"))
        verdict = Verdict.CONFIRMED if close else Verdict.INCONCLUSIVE
    measured = {name: round(means[name], 4) for name in ("75 %", "50 %")}
    return Finding(
        measured, {"all": round(means["all"], 4)}, verdict, {"per_seed": scores, "standard_deviation": spread}
    )


def balance_keeps_heads_in_use(seed: int) -> Finding:
    """Entropy of the use of routed heads, trained with the load-balancing loss and without."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for name, weight in (("with", 0.01), ("without", 0.0)):
        for run in range(SEEDS):
            _, model = _train(HALF, SEEDS * seed + run, head_balance=weight)
            found[name].append(_entropy_of_use(model, SEEDS * seed + run))
    means = {name: mean(values) for name, values in found.items()}
    margin = 2 * (mean(stdev(values) ** 2 for values in found.values()) * 2 / SEEDS) ** 0.5
    verdict = Verdict.INCONCLUSIVE
    if abs(means["with"] - means["without"]) > margin:
        verdict = Verdict.CONFIRMED if means["with"] > means["without"] else Verdict.REFUTED
    return Finding(means["with"], means["without"], verdict, {"per_seed": found, "margin": margin})


def published_sizes(seed: int) -> Finding:
    """Count the parameters of released variants; their accuracy and FID need ImageNet."""
    paper = {"moh_transnext_small_80": 50e6, "moh_transnext_base_75": 90e6, "moh_dit_xl_2_90": 676e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 5e5 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; accuracies and FID need ImageNet" if fits else "the sizes differ"},
    )


class _ViT(nn.Module):
    """A ViT on 16 patches of 2 x 2 pixels; ``choice`` is (shared, active) heads, None has all of them."""

    def __init__(self, choice: tuple[int, int] | None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), _mixer(choice), nn.LayerNorm(WIDTH), Mlp(WIDTH, 2 * WIDTH)])
            for _ in range(BLOCKS)
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.positions
        for first, mixer, second, channels in self.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            x = x + mixer(first(x))
            x = x + channels(second(x))
        return self.head(x.mean(1))


def _mixer(choice: tuple[int, int] | None) -> nn.Module:
    if choice is None:
        return Attention(WIDTH, HEADS, qkv_bias=True)
    return MixtureOfHeadsAttention(WIDTH, HEADS, shared=choice[0], active=choice[1])


def _train(choice: tuple[int, int] | None, seed: int, *, head_balance: float = 0.01) -> tuple[float, _ViT]:
    """(test accuracy, trained model)"""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with collect_routing(model) as routing:
            found = cross_entropy(model(images), labels)
        return found + head_balance * routing.balance_loss()

    model, images, labels = train_on_digits(lambda: _ViT(choice), seed, loss=loss, **TRAINING)
    return accuracy(model, images, labels), cast(_ViT, model)


@torch.no_grad()
def _entropy_of_use(model: _ViT, seed: int) -> float:
    """Mean over the layers of the entropy of how often each routed head is chosen, as a share of the largest."""
    images = digits(TRAINING["size"], seed=seed)[2]
    with collect_routing(model.eval()) as routing:
        model(images)
    used = [found.chosen.flatten(0, -2).float().mean(0) for found in routing.values()]
    shares = [use / use.sum() for use in used]
    return mean(torch.special.entr(share).sum().item() / log(len(share)) for share in shares)


@torch.no_grad()
def _loss(model: Any, test: Tensor) -> float:
    return mean(model(rows, labels=rows, use_cache=False).loss.item() for rows in test.split(4))


def _tuned_loss(model: Any, choice: MixtureOfHeads | None, train: Tensor, test: Tensor, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    learnt = [weight for layer in attention_layers(model) for weight in layer.attention.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(learnt, lr=RATE)
    with _attached(model, choice):
        for _ in range(STEPS):
            start = int(torch.randint(len(train) - TOKENS, (), generator=generator))
            rows = train[None, start : start + TOKENS]
            model(rows, labels=rows, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return _loss(model, test)


@contextmanager
def _attached(model: Any, choice: MixtureOfHeads | None) -> Iterator[None]:
    if choice is None:
        yield
        return
    with choice(model):
        yield


@contextmanager
def _random_heads(model: Any, seed: int) -> Iterator[None]:
    """As many heads as ``SMOLLM_HEADS`` keeps, the routed ones drawn anew for every token."""
    generator, heads = torch.Generator().manual_seed(seed), geometry(model).heads
    shared, active = SMOLLM_HEADS.shared, SMOLLM_HEADS.active

    def keep(layer: int, outputs: Tensor) -> Tensor:
        draws = torch.rand(*outputs.shape[:2], heads, generator=generator)
        draws[..., :shared] = 2
        kept = draws >= draws.topk(shared + active, dim=-1).values[..., -1:]
        return outputs * kept[..., None]

    with head_outputs(model, keep):
        yield


CLAIMS = (
    Claim(
        system="moh",
        name="query_norms",
        statement="A pretrained model's query norms tell which heads a token needs, and a short tuning closes the gap.",
        rule=f"SmolLM2, 4 shared and 2 of 5 routed heads, loss on {TEST_TOKENS} tokens of held-out documentation. "
        f"Refuted when heads chosen at random lose no more. Confirmed when in addition the gap to all heads shrinks by "
        f"over half after {STEPS} AdamW steps of {TOKENS} tokens (attention layers only), both models tuned alike; "
        "else inconclusive.",
        run=query_norms_choose_well,
        full_scale="manyheads try moh --model meta-llama/Meta-Llama-3-8B --device cuda --dtype bfloat16",
    ),
    Claim(
        system="moh",
        name="fewer_heads",
        statement="With 50 to 90 % of the heads at work for each token, accuracy stays that of all heads.",
        rule="A ViT of 4 blocks and 8 heads on digits, 3 seeds, 10 epochs. Confirmed when the means with 75 % and 50 % "
        "are less than one standard deviation (pooled over the three) below that of all heads, refuted when 75 % loses "
        "more than a point.",
        run=fewer_heads_suffice,
        full_scale="manyheads train moh_transnext_base_75 --data imagenet --batch-size 1024 --dtype bfloat16",
    ),
    Claim(
        system="moh",
        name="balance",
        statement="The load-balancing loss keeps tokens from crowding into few heads.",
        rule="Entropy of the use of the 6 routed heads over the test digits, as a share of the largest, mean of 4 "
        "layers and 3 seeds, with the loss (weight 0.01) and without. Confirmed when higher with it by twice the "
        "standard error of the difference, refuted when lower by as much.",
        run=balance_keeps_heads_in_use,
        full_scale="manyheads train moh_transnext_base_50 --data imagenet --batch-size 1024 --dtype bfloat16",
    ),
    Claim(
        system="moh",
        name="published_accuracy",
        statement="84.9 % top-1 on ImageNet with 75 % of the heads (MoH-ViT-B), FID 2.94 with 90 % (MoH-DiT-XL/2).",
        rule="Here only the sizes can be counted: refuted when one is more than 0.5 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate moh_transnext_base_75 --data imagenet --checkpoint Chat-UniVi/MoH-ViT-B-75; "
        "manyheads train moh_dit_xl_2_90 --data imagenet --image-size 256 --dtype bfloat16",
    ),
)
