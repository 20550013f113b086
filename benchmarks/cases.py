"""What is timed: each case builds, for one length, the contestants as functions of the same inputs.

A contestant is ``f(*inputs) -> Tensor``. The first one is ours, "dense SDPA" is the yardstick, the rest are the best
alternatives installable here. Contestants that cannot train (compiled FlexAttention on CPU) say so with ``trains``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.vision import BUILDERS

OURS, SDPA = "manyheads", "dense SDPA"


@dataclass
class Round:
    """One case at one length."""

    inputs: tuple[Tensor, ...]
    contestants: dict[str, Callable[..., Tensor]]
    forward_only: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Case:
    """A named benchmark: ``build(length, device, dtype)`` makes the contestants for a number of tokens."""

    name: str
    engine: str
    build: Callable[[int, str, torch.dtype], Round]
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    backward: bool = True


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _normal(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _qkv(length: int, device: str, dtype: torch.dtype, heads: int = 2, head_dim: int = 64) -> tuple[Tensor, ...]:
    return tuple(_normal(1, heads, length, head_dim, device=device, dtype=dtype) for _ in range(3))


def _compiled_flex(device: str, length: int, mask_mod: Callable) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(mask_mod, None, None, length, length, device=device)
    return torch.compile(partial(flex_attention, block_mask=block_mask), dynamic=False)


def learnable_bias(length: int, device: str, dtype: torch.dtype) -> Round:
    """Softmax with a dense additive bias that is trained; SDPA falls back to its quadratic-memory path."""
    from manyheads.engines.dense import attention

    bias = _normal(2, length, length, device=device, dtype=dtype)
    return Round(
        (*_qkv(length, device, dtype), bias),
        {
            OURS: lambda q, k, v, b: attention(q, k, v, bias=b),
            SDPA: lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b[None]),
        },
    )


def sliding_window(length: int, device: str, dtype: torch.dtype) -> Round:
    """A window of 129 tokens in one dimension."""
    from manyheads.ops.neighborhood import neighborhood_attention

    contestants: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: neighborhood_attention(q, k, v, window=129),
        SDPA: F.scaled_dot_product_attention,
        "compiled FlexAttention": _compiled_flex(device, length, lambda b, h, q, k: (q - k).abs() <= 64),
    }
    return Round(_qkv(length, device, dtype), contestants, set() if device == "cuda" else {"compiled FlexAttention"})


def neighborhood_2d(length: int, device: str, dtype: torch.dtype) -> Round:
    """The 7 x 7 neighbourhood of NAT on a square map."""
    from manyheads.ops.neighborhood import neighborhood_attention

    side = round(length**0.5)
    grid = tuple(_normal(1, 2, side, side, 32, device=device, dtype=dtype) for _ in range(3))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))

    def clamped(position: Tensor) -> Tensor:
        return position.clamp(3, side - 4)

    def neighbours(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        rows = (clamped(q // side) - k // side).abs() <= 3
        return rows & ((clamped(q % side) - k % side).abs() <= 3)

    flex = _compiled_flex(device, side * side, neighbours)
    contestants: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: neighborhood_attention(q, k, v, window=7),
        SDPA: dense,
        "compiled FlexAttention": lambda q, k, v: flex(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)),
    }
    forward_only = set() if device == "cuda" else {"compiled FlexAttention"}
    if _installed("natten") and (device == "cuda" or side <= 64):
        # On a CPU NATTEN has only eager FlexAttention, which holds all pairs: longer maps do not fit.
        from natten import na2d

        def natten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.permute(0, 2, 3, 1, 4).contiguous() for x in (q, k, v))
            return na2d(q, k, v, kernel_size=7).permute(0, 3, 1, 2, 4)

        contestants["NATTEN"] = natten
        forward_only |= set() if device == "cuda" else {"NATTEN"}
    return Round(grid, contestants, forward_only)


def linear_decay(length: int, device: str, dtype: torch.dtype) -> Round:
    """Causal linear attention with a decay for each head (lightning attention)."""
    from manyheads.ops.lightning import lightning_attention, lightning_slopes

    slopes = lightning_slopes(8).to(device)
    contestants: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: lightning_attention(q, k, v, slopes=slopes),
        SDPA: partial(F.scaled_dot_product_attention, is_causal=True),
    }
    if _installed("fla"):
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla

        def fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            decay = -slopes.expand(1, q.shape[2], -1)
            result = naive_chunk_simple_gla(*(x.transpose(1, 2) for x in (q, k, v)), decay, scale=1.0)
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        contestants["flash-linear-attention (chunked)"] = fla
    return Round(_qkv(length, device, dtype, heads=8), contestants)


def linear_feature_map(length: int, device: str, dtype: torch.dtype) -> Round:
    """Noncausal linear attention with elu + 1 features and a normaliser."""
    from manyheads.engines.linear import linear_attention

    return Round(
        _qkv(length, device, dtype),
        {
            OURS: lambda q, k, v: linear_attention(q, k, v, feature_map="elu", normalize=True, causal=False),
            SDPA: F.scaled_dot_product_attention,
        },
    )


def bilevel_routing(length: int, device: str, dtype: torch.dtype) -> Round:
    """BiFormer's first stage: every region reads its single best region of 49 (top-1 of 7 x 7)."""
    from manyheads.ops.bilevel_routing import bilevel_routing_attention

    side = round(length**0.5) // 7 * 7
    grid = tuple(_normal(1, 2, side, side, 32, device=device, dtype=dtype) for _ in range(3))
    ours = partial(bilevel_routing_attention, regions=7, topk=4, scale=64**-0.5)
    return Round(
        grid,
        {
            OURS: ours,
            SDPA: lambda q, k, v: F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)),
            "authors' gather": partial(ours, backend="reference"),
        },
    )


def hilo(length: int, device: str, dtype: torch.dtype) -> Round:
    """LITv2's stage 3: 2 heads in windows of 2 x 2, 10 heads on the map pooled 2 x 2."""
    from manyheads.ops.hilo import hilo_attention

    side = round(length**0.5)
    grid = tuple(_normal(1, 12, side, side, 32, device=device, dtype=dtype) for _ in range(3))
    ours = partial(hilo_attention, window=2, low_heads=10)
    return Round(
        grid,
        {
            OURS: ours,
            SDPA: lambda q, k, v: F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)),
            "the equations": partial(ours, backend="reference"),
        },
    )


def aggregated(length: int, device: str, dtype: torch.dtype) -> Round:
    """TransNeXt: 3 x 3 neighbours and 49 pooled keys in one softmax, with biases and learnable tokens."""
    from manyheads.ops.aggregated import aggregated_attention

    side = round(length**0.5)
    normal = partial(_normal, device=device, dtype=dtype)
    grid, pooled = (1, 4, side, side, 24), (1, 4, 49, 24)
    shapes = (grid, grid, grid, pooled, pooled, (4, 1, 1), (4, 9), (4, side * side, 49), (4, 24, 9))

    def attend(*x: Tensor, backend: str = "auto") -> Tensor:
        names = ("temperature", "bias_local", "bias_pool", "learnable_tokens")
        return aggregated_attention(*x[:5], **dict(zip(names, x[5:])), backend=backend)

    def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))

    # The authors' path without their CUDA extension unfolds keys and values, as the reference does.
    contestants = {OURS: attend, SDPA: dense, "unfolded neighbourhoods": partial(attend, backend="reference")}
    return Round(tuple(normal(*shape) for shape in shapes), contestants)


def mixture_of_heads(length: int, device: str, dtype: torch.dtype) -> Round:
    """MoH: every token uses 2 shared heads of 8 and 2 of the other 6, as many tokens for each."""
    from manyheads.ops.mixture_of_heads import learned_routing, mixture_of_heads_attention

    scores = torch.randn(1, length, 10, device=device, dtype=dtype)
    routing = learned_routing(scores[..., :6], scores[..., 6:8], scores[..., 8:], active=2)
    gates = routing.gates.transpose(1, 2).contiguous()
    every_head = partial(mixture_of_heads_attention, backend="dense")
    return Round(
        (*_qkv(length, device, dtype, heads=8), gates),
        {
            OURS: mixture_of_heads_attention,
            SDPA: lambda q, k, v, gates: F.scaled_dot_product_attention(q, k, v),
            "all heads, as the authors": every_head,
        },
    )


def spectral(length: int, device: str, dtype: torch.dtype) -> Round:
    """SpectFormer's first stage: a filter over the whole map, where attention would compare all positions."""
    from manyheads.ops.spectral import spectral_gating

    side = round(length**0.5)
    x = _normal(1, side, side, 64, device=device, dtype=dtype)
    weight = _normal(side, side // 2 + 1, 64, 2, device=device, dtype=dtype)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        tokens = x.flatten(1, 2).unflatten(2, (2, 32)).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)

    return Round((x, weight), {OURS: spectral_gating, SDPA: dense})


def predicted_pairs(length: int, device: str, dtype: torch.dtype) -> Round:
    """Sparsifiner: predictor and the quarter of the pairs that it chooses, 6 heads of 64."""
    from manyheads.layers.sparsifiner import ConnectivityPredictor
    from manyheads.ops.sparse_connectivity import block_attention, pair_index, sparse_attention

    predictor = ConnectivityPredictor(64, length).to(device, dtype).requires_grad_(False)

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
        return sparse_attention(q, k, v, pair_index(predictor(q, k).scores, predictor.rule), backend=backend)

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, predictor(q, k).scores, predictor.rule)

    qkv = tuple(_normal(1, 6, length, 64, device=device, dtype=dtype) for _ in range(3))
    # The authors' code computes all pairs and masks them.
    contestants = {OURS: ours, SDPA: F.scaled_dot_product_attention, "masked": partial(ours, backend="reference")}
    return Round(qkv, {**contestants, "gathered": partial(ours, backend="gather"), "blocks of 16": blocks})


def mixer_gate(length: int, device: str, dtype: torch.dtype) -> Round:
    """NiNformer's gating unit at the width of its models, where attention (without projections) has 4 heads of 64."""
    from manyheads.layers.mixer_gate import MixerGating
    from manyheads.ops.mixer_gate import mixer_gating

    unit = MixerGating(256, length, 512).to(device, dtype).requires_grad_(False)
    weights = (unit.proj.weight, unit.proj.bias), unit.mixer.weights

    def dense(x: Tensor) -> Tensor:
        tokens = x.unflatten(2, (4, 64)).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)

    def ours(x: Tensor, backend: str = "auto") -> Tensor:
        return mixer_gating(x, *weights, backend=backend)

    # The authors' code transposes the tokens before and after, as the reference does.
    contestants = {OURS: ours, SDPA: dense, "transposed tokens": partial(ours, backend="reference")}
    return Round((_normal(1, length, 256, device=device, dtype=dtype),), contestants)


def injective(length: int, device: str, dtype: torch.dtype) -> Round:
    """InLine attention, 4 heads of 32 channels."""
    from manyheads.ops.inline import inline_attention

    contestants = {
        OURS: inline_attention,
        SDPA: F.scaled_dot_product_attention,
        "the equations": partial(inline_attention, backend="reference"),
    }
    return Round(_qkv(length, device, dtype, heads=4, head_dim=32), contestants)


def agents(length: int, device: str, dtype: torch.dtype) -> Round:
    """Agent attention, 4 heads of 32 channels, 49 agents with their biases."""
    from manyheads.ops.agent import agent_attention

    normal = partial(_normal, device=device, dtype=dtype)
    shapes = ((1, 4, 49, 32), (4, 49, length), (4, length, 49))

    def attend(q: Tensor, k: Tensor, v: Tensor, few: Tensor, *biases: Tensor, backend: str = "auto") -> Tensor:
        return agent_attention(q, k, v, few, agent_bias=biases[0], query_bias=biases[1], backend=backend)

    def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    inputs = (*_qkv(length, device, dtype, heads=4, head_dim=32), *(normal(*shape) for shape in shapes))
    return Round(inputs, {OURS: attend, SDPA: dense, "the equations": partial(attend, backend="reference")})


def reversed_(length: int, device: str, dtype: torch.dtype) -> Round:
    """DependencyViT's reversed attention, against the whole matrix and the flash kernel's gradient for the values."""
    from manyheads.ops.reversed import reversed_attention

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = torch.zeros_like(v).requires_grad_()
            out = F.scaled_dot_product_attention(q.detach(), k.detach(), leaf)
        return torch.autograd.grad(out, leaf, v)[0]

    return Round(
        _qkv(length, device, dtype, heads=12, head_dim=32),
        {
            OURS: reversed_attention,
            SDPA: F.scaled_dot_product_attention,
            "the whole matrix": partial(reversed_attention, backend="dense"),
            "SDPA's gradient": gradient,
        },
        {"SDPA's gradient"},
    )


def channel(length: int, device: str, dtype: torch.dtype) -> Round:
    """DaViT's channel-group attention, 3 groups of 32 channels."""
    from manyheads.ops.channel import channel_attention

    def transposed_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT, scale=q.shape[-1] ** -0.5).mT

    return Round(
        _qkv(length, device, dtype, heads=3, head_dim=32),
        {OURS: channel_attention, SDPA: F.scaled_dot_product_attention, "SDPA over channels": transposed_sdpa},
    )


def decode_selected(length: int, device: str, dtype: torch.dtype) -> Round:
    """One query against a long cache, reading 512 selected tokens for each key/value head."""
    from manyheads.engines.select import select_attention

    query = _normal(1, 32, 1, 128, device=device, dtype=dtype)
    key, value = (_normal(1, 8, length, 128, device=device, dtype=dtype) for _ in range(2))
    index = torch.stack([torch.randperm(length)[:512].sort().values for _ in range(8)])[None, :, None].to(device)
    return Round(
        (query, key, value),
        {
            OURS: lambda q, k, v: select_attention(q, k, v, index),
            SDPA: partial(F.scaled_dot_product_attention, enable_gqa=True),
        },
    )


def merging(length: int, device: str, dtype: torch.dtype) -> Round:
    """Combining four partial results through their log-sum-exp."""
    from manyheads.engines.merge import merge

    parts = [_normal(1, 8, length, 64, device=device, dtype=dtype) for _ in range(4)]
    lses = [_normal(1, 8, length, device=device, dtype=torch.float32) for _ in range(4)]

    def ours(*tensors: Tensor) -> Tensor:
        return merge(tensors[:4], tensors[4:])[0]

    def stacked(*tensors: Tensor) -> Tensor:
        weights = torch.stack(tensors[4:]).softmax(dim=0).unsqueeze(-1)
        return (torch.stack(tensors[:4]) * weights).sum(dim=0)

    return Round((*parts, *lses), {OURS: ours, "softmax over a stack": stacked})


def sharded(length: int, device: str, dtype: torch.dtype) -> Round:
    """Causal attention over two processes of this machine; "manyheads" is the zigzag ring. CPU, whatever the device."""
    from benchmarks.parallel import contestants

    found = contestants()
    found = {OURS: found.pop("zigzag ring"), SDPA: partial(F.scaled_dot_product_attention, is_causal=True), **found}
    return Round(_qkv(length, "cpu", dtype, heads=4), found)


def vision(build: Callable, length: int, device: str, dtype: torch.dtype) -> Round:
    """A whole model against timm's on ``length`` images."""
    images, contestants = build(length, device, dtype)
    return Round((images,), contestants)


CASES = (
    Case("learnable bias", "dense", learnable_bias, lengths=(256, 1024, 2048)),
    Case("sliding window 129", "blocksparse", sliding_window),
    Case("neighborhood 7 x 7", "blocksparse", neighborhood_2d, lengths=(28 * 28, 56 * 56, 128 * 128)),
    Case("bi-level routing top-4 of 49", "blocksparse", bilevel_routing, lengths=(28 * 28, 56 * 56, 126 * 126)),
    Case("HiLo, alpha 0.9, window 2", "dense", hilo, lengths=(14 * 14, 28 * 28, 56 * 56)),
    Case("aggregated 3 x 3 and 7 x 7", "merge", aggregated, lengths=(14 * 14, 28 * 28, 56 * 56)),
    Case("mixture of heads, 4 of 8", "dense", mixture_of_heads, lengths=(256, 1024, 4096)),
    Case("spectral filter", "dense", spectral, lengths=(14 * 14, 28 * 28, 56 * 56, 112 * 112)),
    Case("predicted pairs, a quarter", "dense", predicted_pairs, lengths=(14 * 14 + 1, 28 * 28 + 1)),
    Case("mixer gate, 512 units", "dense", mixer_gate, lengths=(8 * 8, 16 * 16, 32 * 32, 64 * 64)),
    Case("linear with decay", "linear", linear_decay),
    Case("linear with features", "linear", linear_feature_map),
    Case("49 agents", "dense", agents),
    Case("injective linear", "linear", injective),
    Case("reversed", "dense", reversed_, lengths=(14 * 14, 28 * 28, 56 * 56)),
    Case("channel groups", "linear", channel),
    Case("decode 512 selected tokens", "select", decode_selected, backward=False),
    Case("merge of four", "merge", merging),
    Case("causal, sharded over two ranks", "parallel", sharded, backward=False),
    *(
        Case(f"{name} (images)", "models", partial(vision, build), lengths=(1, 8), backward=False)
        for name, build in BUILDERS.items()
    ),
)
