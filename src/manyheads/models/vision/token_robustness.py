"""TAP, and the attention that ADL looks at, on any token backbone.

A block ``x + attn(norm1(x))`` gets token-aware pooling by a ``PooledNorm`` in place of ``norm1``; nothing else of the
model changes. Attention modules that follow timm's custom (``attn_drop`` on the weights, ``fused_attn`` to choose
torch's kernel) show their weights while ``attention_maps`` is open, and what these come from while they run fused in
``attention_inputs``.

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manyheads.engines.common import repeat_heads, resolve_scale
from manyheads.layers.tap import Grid, PooledNorm
from manyheads.objectives.diversification import SoftmaxInput

# A norm and the attention behind it: timm and ours (DINOv2 in transformers), ViT, CLIP and SigLIP there, torchvision.
_BLOCKS = (
    ("norm1", "attn"),
    ("norm1", "attention"),
    ("layernorm_before", "attention"),
    ("layer_norm1", "self_attn"),
    ("ln_1", "self_attention"),
)
_PREFIXES = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token", "register_tokens")
# Blocks that norm what attention gave, under the same names: of timm, torchvision and transformers.
_POST_NORM = {
    "SwinTransformerV2Block", "SwinTransformerV2CrBlock", "ResPostBlock", "ResPostRelPosBlock",
    "SwinTransformerBlockV2", "Swinv2Layer",
}  # fmt: skip


def add_token_pooling(
    model: nn.Module,
    *,
    grid: Grid | None = None,
    prefix: int | None = None,
    num_scales: int = 4,
    temperature: int | float = 1.0,
) -> nn.Module:
    """Put token-aware pooling in front of the attention of every block of a transformer, in place.

    A block is a module with a norm in front of its attention: ``norm1`` and ``attn`` in timm's vision transformers
    (ViT, DeiT, BEiT, EVA, Swin, PVT, CaiT, ...) and ours, under their names in torchvision and in transformers (ViT,
    DINOv2, CLIP and SigLIP towers). Its width is that of the norm. The pools start at random and want training.

    Args:
        model: changed in place.
        grid: rows and columns of the token map where it is no square; None asks ``model.patch_embed.grid_size``.
        prefix: class and register tokens in front of the patches; None asks ``model.num_prefix_tokens``, or counts
            what the model has.
        num_scales, temperature: of ``manyheads.layers.tap.TokenAwarePooling``.

    Returns:
        The model.

    Raises:
        ValueError: no such block, blocks whose norm stands behind the attention (Swin v2), or blocks that have
            token-aware pooling already.

    >>> import timm, torch
    >>> vit = add_token_pooling(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10))
    >>> vit(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    found = [(block, name) for block in model.modules() if (name := _norm_of(block)) is not None]
    if not found:
        tried = ", ".join(f"{norm} and {attention}" for norm, attention in _BLOCKS)
        raise ValueError(f"{type(model).__name__} has no block in front of which TAP could stand; tried {tried}")
    if any(isinstance(getattr(b, name), PooledNorm) or hasattr(b, "dilation_predictor") for b, name in found):
        raise ValueError(f"{type(model).__name__} has token-aware pooling already")
    behind = sorted({type(block).__name__ for block, _ in found} & _POST_NORM)
    if behind:
        raise ValueError(f"the norm of {', '.join(behind)} stands behind the attention: TAP has to stand before it")
    if grid is None:
        known: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        grid = (known[0], known[1]) if known is not None else None
    if prefix is None:
        prefix = _prefix_of(model)
    for block, name in found:
        norm: Any = getattr(block, name)
        weight = norm.weight
        pooled = PooledNorm(
            norm, weight.shape[0], grid=grid, prefix=prefix, num_scales=num_scales, temperature=temperature
        )
        setattr(block, name, pooled.to(weight.device, weight.dtype).train(block.training))
    return model


def _norm_of(block: nn.Module) -> str | None:
    return next((norm for norm, attention in _BLOCKS if hasattr(block, norm) and hasattr(block, attention)), None)


def _prefix_of(model: nn.Module) -> int:
    """How many tokens the model puts in front of the patches: what it says, else its class and register tokens."""
    known: Any = getattr(model, "num_prefix_tokens", None)
    if known is not None:
        return int(known)
    counts = {}
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in _PREFIXES:
            counts[last] = parameter.shape[1] if parameter.ndim == 3 else 1
    return sum(counts.values())


@contextmanager
def attention_maps(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which every forward pass inside the ``with`` block adds the attention weights of all layers, in order.

    The weights (batch, heads, queries, keys) are those after the softmax and before dropout, part of the graph; layers
    compute them one by one instead of in torch's fused kernel. On leaving, the model is as it was.

    Args:
        model: with attention modules that have ``attn_drop`` and ``fused_attn``, as timm's and ours.

    Raises:
        ValueError: no attention module can show its weights. Single ones that cannot give a warning.

    >>> import timm, torch
    >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    >>> with attention_maps(vit) as maps:
    ...     logits = vit(torch.randn(1, 3, 32, 32))
    >>> [tuple(weights.shape) for weights in maps]
    [(1, 3, 5, 5), (1, 3, 5, 5)]
    """
    modules = _visible(model)
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps.append(inputs[0])

    fused = [module.fused_attn for module in modules]
    handles = [module.attn_drop.register_forward_pre_hook(keep) for module in modules]
    for module in modules:
        module.fused_attn = False
    try:
        yield maps
    finally:
        for module, before, handle in zip(modules, fused, handles):
            module.fused_attn = before
            handle.remove()


@contextmanager
def attention_inputs(model: nn.Module) -> Iterator[list[Tensor | SoftmaxInput]]:
    """As ``attention_maps``, but layers go on using torch's fused kernel and no weights are made for those that do.

    Such a layer adds the queries and keys that it gives to ``F.scaled_dot_product_attention``; one that gives a mask
    along, and one that computes its weights itself, adds the weights. The list is what
    ``attention_diversification_loss`` takes.

    Args:
        model: with attention modules that have ``attn_drop`` and ``fused_attn``, as timm's and ours.

    Raises:
        ValueError: no attention module can show its weights; in the forward pass, one that shows nothing.

    >>> import timm, torch
    >>> from manyheads.objectives.diversification import attention_diversification_loss
    >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    >>> with attention_inputs(vit) as layers:
    ...     logits = vit(torch.randn(1, 3, 32, 32))
    >>> [tuple(layer.query.shape) for layer in layers], attention_diversification_loss(layers).requires_grad
    ([(1, 3, 5, 64), (1, 3, 5, 64)], True)
    """
    modules = _visible(model)
    watch = _FusedCalls()

    def keep(drop: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watch.seen.append(inputs[0])

    def enter(module: nn.Module, inputs: object) -> None:
        watch.inside, watch.before = True, len(watch.seen)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        watch.inside = False
        if len(watch.seen) == watch.before:
            raise ValueError(f"{type(module).__name__} shows neither attention weights nor queries and keys")

    handles = [module.attn_drop.register_forward_pre_hook(keep) for module in modules]
    handles += [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        with watch:
            yield watch.seen
    finally:
        for handle in handles:
            handle.remove()


class _FusedCalls(TorchFunctionMode):
    """Note what is given to torch's fused attention while ``inside``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor | SoftmaxInput] = []
        self.inside, self.before = False, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and self.inside:
            self.seen.append(_shown(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _shown(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | SoftmaxInput:
    key = repeat_heads(key, query.shape[1]) if enable_gqa else key
    if attn_mask is None and not is_causal:
        return SoftmaxInput(query, key, scale)
    scores = query * resolve_scale(scale, query.shape[-1]) @ key.mT
    if is_causal:
        attn_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    assert attn_mask is not None
    masked = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return masked.softmax(-1)


def _visible(model: nn.Module) -> list[Any]:
    """The attention modules that follow timm's custom; a warning names those that do not."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "attn_drop") and hasattr(m, "fused_attn")]
    hidden = sorted(
        {
            type(m).__name__
            for m in model.modules()
            if isinstance(m, nn.MultiheadAttention) or (hasattr(m, "qkv") and m not in modules)
        }
    )
    if not modules:
        seen = f": {', '.join(hidden)} cannot" if hidden else ""
        raise ValueError(f"no attention of {type(model).__name__} can return its weights{seen}")
    if hidden:
        # Above this function: the context manager, contextlib, and the ``with`` of the caller.
        warnings.warn(f"{', '.join(hidden)} cannot return attention weights and are left out", stacklevel=4)
    return modules
