"""MoH for pretrained language models: every token uses the first heads, and those others whose queries are longest.

Nothing is added to the model. In each attention layer, with q_i the query of head i::

    P = softmax( l / std(l) ),  l_i = |q_i|  over the routed heads        S = the K largest
    y = W_o concat_i( m_i o_i ),   m_i = 1 for shared heads and those in S, else 0

In training the chosen heads' m_i = P_i + stopgrad(1 - P_i), so that routing learns through the query norms. Keys,
values, masks and the cache are those of the model: a token's choice depends on that token alone.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, section 4.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyheads.interpret.attach import AttentionCall, attention_function, geometry
from manyheads.ops.mixture_of_heads import Routing, check_routing, mixture_of_heads_attention, query_norm_routing

# Options of transformers' attention call that say nothing which the mask does not say.
_MASK_OR_CACHE = ("position_ids", "cache_position", "use_cache", "sliding_window", "is_causal")


@dataclass
class HeadRouting:
    """What the layers chose in the last forward call inside the ``with`` block.

    Attributes:
        layers: layer number to its ``Routing``: gates (batch, tokens, heads), probabilities and chosen (batch, tokens,
            routed heads).
    """

    layers: dict[int, Routing] = field(default_factory=dict)

    def head_mask(self) -> Tensor:
        """(layers, batch, tokens, heads) boolean: the heads that each token used.

        Raises:
            ValueError: no forward call was made yet.
        """
        self._check()
        return torch.stack([self.layers[layer].gates != 0 for layer in sorted(self.layers)])

    def balance_loss(self, attention_mask: Tensor | None = None) -> Tensor:
        """The load-balancing loss, averaged over the layers; K where all routed heads are used alike.

        Args:
            attention_mask: (batch, tokens) of the last call, 1 for the tokens that count; None counts all.

        Raises:
            ValueError: no forward call was made yet.
        """
        self._check()
        real = None if attention_mask is None else attention_mask.bool()
        return torch.stack([routing.balance_loss(real) for routing in self.layers.values()]).mean()

    def _check(self) -> None:
        if not self.layers:
            raise ValueError("no forward call was made yet inside the with block")


@dataclass(frozen=True)
class MixtureOfHeads:
    """Attach with ``with MixtureOfHeads(shared, active)(model): ...``; on exit the model is bit for bit what it was.

    Plain calls, ``generate()``, batches with padding, any cache and any attention backend serve; tune the model
    inside the block, adding ``0.01 * routing.balance_loss()`` to its loss.

    Models that normalise their queries (Qwen3, Gemma 3) have queries of nearly equal length, so that little is left to
    choose by.

    In calls of many tokens whose attention is SDPA without dropout, heads that few tokens chose attend with these alone
    (see ``mixture_of_heads_attention``); otherwise, and while decoding, all heads are computed and the others put to
    zero.

    Args:
        shared: h_s, the first heads of each layer, which every token uses.
        active: K, how many of the others each token uses.

    Raises:
        ValueError: negative numbers; on attaching, head counts that do not fit the model, fewer than 2 routed heads.
        RuntimeError: something is attached to the model already.

    Source: arXiv 2410.11842, section 4.4.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)).eval()
    >>> with MixtureOfHeads(shared=2, active=1)(model) as routing, torch.no_grad():
    ...     logits = model(torch.arange(1, 8)[None]).logits
    >>> routing.head_mask().shape, routing.head_mask().sum(-1).unique().tolist()
    (torch.Size([2, 1, 7, 4]), [3])
    """

    shared: int
    active: int

    def __post_init__(self) -> None:
        if self.shared < 0 or self.active < 1:
            raise ValueError(f"shared={self.shared} must not be negative, and active={self.active} be at least 1")

    @classmethod
    def published(cls, model: PreTrainedModel) -> MixtureOfHeads:
        """The sizes of MoH-LLaMA3-8B: half of the heads shared, a quarter chosen (both rounded down)."""
        heads = geometry(model).heads
        return cls(shared=heads // 2, active=heads // 4)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[HeadRouting]:
        """Attach to a Hugging Face causal language model for the length of a ``with`` block."""
        heads = geometry(model).heads
        check_routing(heads, self.shared, self.active)
        if heads - self.shared < 2:
            raise ValueError(f"shared={self.shared} of the model's {heads} heads leaves fewer than 2 to choose from")
        routing = HeadRouting()
        with attention_function(model, _Attend(self, routing)):
            yield routing


class _Attend:
    """The attention function: the model's own on all heads, or ours on the chosen ones."""

    def __init__(self, choice: MixtureOfHeads, routing: HeadRouting) -> None:
        self.choice, self.routing = choice, routing

    def __call__(
        self,
        call: AttentionCall,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        learns = torch.is_grad_enabled() and query.requires_grad
        shared, active = self.choice.shared, self.choice.active
        found = query_norm_routing(query, shared=shared, active=active, straight_through=learns)
        self.routing.layers[call.layer] = found
        gates = found.gates.to(query.dtype)
        plain = not dropout and all(
            name in _MASK_OR_CACHE or value is None or value is False for name, value in options.items()
        )
        # Without a mask attention is causal, unless the call or else the module says that it is not.
        told = options.get("is_causal")
        causal = attention_mask is None and bool(getattr(module, "is_causal", True) if told is None else told)
        square = query.shape[2] == key.shape[2]
        ours = attention_mask.dtype == torch.bool if attention_mask is not None else square or not causal
        if query.shape[2] == 1 or not (plain and ours):
            out, _ = call.original(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
            )
            return out * gates[..., None], None
        out = mixture_of_heads_attention(
            query, key, value, gates.transpose(1, 2), scale=scaling, causal=causal,
            mask=None if attention_mask is None else attention_mask[..., : key.shape[2]],
        )  # fmt: skip
        return out.transpose(1, 2), None
