"""AgentSD: latent diffusion models attend through agents, without training.

In every transformer block of the U-Net whose map is large, the self-attention sees fewer tokens (similar ones are
merged) and, where that pays, reads them through even fewer agents::

    M = merge(LN(x), r),  a = merge(LN(x), r_a),  A = to_q(a)
    x <- x + unmerge( to_out( agent_attention(Q(M), K(M), V(M), A; scales s and s^k_scale2, shortcut k_shortcut) ) )

Tokens are matched by the cosine of the block's input. Cross-attention and feed-forward are left alone by default.

Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874, section 5.4; merging:
"Token Merging for Fast Stable Diffusion", arXiv 2303.17604.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import ceil, isqrt, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.ops.agent import agent_attention
from manyheads.ops.token_merge import TokenMatching, match_tokens

ATTACHED = "_manyheads_agent_diffusion"


@dataclass(frozen=True)
class AgentDiffusion:
    """Attach with ``with AgentDiffusion()(pipeline.unet): pipeline(...)``; on exit the model is what it was.

    Works on any diffusers model made of ``BasicTransformerBlock`` (Stable Diffusion 1.x, 2.x, XL).

    Args:
        ratio: share of the tokens merged before attention (r), in [0, 1).
        agent_ratio: share of the tokens that do not become agents, in [0, 1). Agents are made only where they are
            fewer than half of the merged tokens; elsewhere softmax attention reads the merged tokens.
        cell: (rows, columns) of the cells that have one merging destination each ("sy, sx").
        max_downsample: blocks at up to this fraction of the latent's resolution are changed.
        use_rand: destinations at random places of their cells, from a generator of its own; batches of odd size keep
            the corner, as in the authors' code.
        seed: of that generator, which starts anew with every attachment.
        k_scale2: power of s in the second softmax's scale.
        k_shortcut: share of each token's value that is added.
        attn_precision: "fp32" computes agent attention in float32 (Stable Diffusion 2.x), "" in the model's dtype.
        merge_attn: merge for the self-attention.
        merge_crossattn: merge for the cross-attention too (plain merging, without agents).
        merge_mlp: merge for the feed-forward too.
        later: another setting that takes over at step ``later_from`` of a generation.
        later_from: the first step of ``later``; a step is a new timestep, and one above the last starts a generation.

    Raises:
        ValueError: ratios outside [0, 1), empty cells; on attaching, a model without such blocks; while generating, a
            cell larger than a map, or an attention mask in a self-attention that is changed.
        RuntimeError: something is attached to the model already.

    Source: arXiv 2312.08874, section 5.4.

    >>> AgentDiffusion.published(0.1).later
    AgentDiffusion(ratio=0.1, agent_ratio=0.5, cell=(2, 2))
    """

    ratio: float = 0.5
    agent_ratio: float = 0.8
    cell: tuple[int, int] = (2, 2)
    max_downsample: int = field(default=1, repr=False)
    use_rand: bool = field(default=True, repr=False)
    seed: int = field(default=0, repr=False)
    k_scale2: float = field(default=0.3, repr=False)
    k_shortcut: float = field(default=0.075, repr=False)
    attn_precision: str = field(default="", repr=False)
    merge_attn: bool = field(default=True, repr=False)
    merge_crossattn: bool = field(default=False, repr=False)
    merge_mlp: bool = field(default=False, repr=False)
    later: AgentDiffusion | None = field(default=None, repr=False)
    later_from: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        for name in ("ratio", "agent_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if min(self.cell) < 1:
            raise ValueError(f"cell={self.cell} must have at least one row and column")
        if self.attn_precision not in ("", "fp32"):
            raise ValueError(f"attn_precision={self.attn_precision!r} is not one of '', 'fp32'")

    @classmethod
    def published(cls, ratio: float = 0.5, **options: Any) -> AgentDiffusion:
        """The authors' schedule of 50 steps: 20 with few agents, then plain merging in small cells."""
        first = cls(ratio=ratio, agent_ratio=0.95, cell=(4, 4), **options)
        return replace(first, later=replace(first, agent_ratio=0.5, cell=(2, 2)), later_from=20)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        """Attach to a U-Net for the length of a ``with`` block."""
        blocks = [module for module in model.modules() if _is_block(module)]
        if not blocks:
            raise ValueError(
                f"{type(model).__name__} holds no transformer block with attn1, norm1 and to_q, to_k, to_v, to_out: "
                "pass the U-Net of a diffusers pipeline"
            )
        if hasattr(model, ATTACHED) or any(hasattr(block, ATTACHED) for block in blocks):
            raise RuntimeError("AgentDiffusion is attached to this model already; leave its with block first")
        state = _State(self)
        with ExitStack() as stack:
            setattr(model, ATTACHED, True)
            stack.callback(delattr, model, ATTACHED)
            if model not in blocks:
                stack.callback(model.register_forward_pre_hook(state.start, with_kwargs=True).remove)
            for block in blocks:
                _attach(block, state, stack)
            yield model


class _State:
    """What one attachment knows of the forward call under way: the latent's size and the step."""

    def __init__(self, setting: AgentDiffusion) -> None:
        self.first = self.setting = setting
        self.latent: tuple[int, int] | None = None
        self.step, self.timestep = 0, None
        self.generators: dict[torch.device, torch.Generator] = {}

    def start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = kwargs.get("sample", args[0] if args else None)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if isinstance(sample, Tensor) and sample.ndim == 4:
            self.latent = (sample.shape[2], sample.shape[3])
        if timestep is not None:
            now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
            if self.timestep is None or now > self.timestep:
                self.step = 0
            elif now < self.timestep:
                self.step += 1
            self.timestep = now
        later = self.first.later
        self.setting = later if later is not None and self.step >= self.first.later_from else self.first

    def match(self, x: Tensor) -> TokenMatching | None:
        """How the tokens of a block's input are paired; None where the block is left as it is."""
        grid = self._grid(x.shape[1])
        if grid is None:
            return None
        setting, generator = self.setting, None
        if setting.use_rand and x.shape[0] % 2 == 0:
            if x.device not in self.generators:
                self.generators[x.device] = torch.Generator(x.device).manual_seed(setting.seed)
            generator = self.generators[x.device]
        return match_tokens(x, grid, setting.cell, generator=generator)

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        if self.latent is None:  # a block on its own: its map is taken to be square
            side = isqrt(tokens)
            return (side, tokens // side)
        height, width = self.latent
        shrunk = ceil(sqrt(height * width // tokens))
        if not 1 <= shrunk <= self.setting.max_downsample:
            return None
        return ceil(height / shrunk), ceil(width / shrunk)


class _Processor:
    """The self-attention of one block: merged tokens, read through agents where that pays."""

    def __init__(self, original: Any, state: _State) -> None:
        self.original, self.state = original, state
        self.matching: TokenMatching | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        matching, setting = self.matching, self.state.setting
        if matching is None or encoder_hidden_states is not None or not setting.merge_attn:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        gone, kept_from_agents = matching.count(setting.ratio), matching.count(setting.agent_ratio)
        tokens = hidden_states.shape[1]
        through_agents = 2 * (tokens - kept_from_agents) < tokens - gone
        if attention_mask is not None and (gone or through_agents):
            raise ValueError("AgentDiffusion cannot merge tokens under an attention mask in a self-attention")
        merged = matching.merge(hidden_states, gone) if gone else hidden_states
        if not through_agents:
            out = self.original(attn, merged, None, attention_mask, *args, **kwargs)
        else:
            out = self._through_agents(attn, merged, matching.merge(hidden_states, kept_from_agents))
        return matching.unmerge(out, gone) if gone else out

    def _through_agents(self, attn: Any, merged: Tensor, agents: Tensor) -> Tensor:
        setting = self.state.setting
        split = lambda t: t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = split(attn.to_q(merged)), split(attn.to_k(merged)), split(attn.to_v(merged))
        few = split(attn.to_q(agents))
        if getattr(attn, "norm_q", None) is not None:
            query, few = attn.norm_q(query), attn.norm_q(few)
        if getattr(attn, "norm_k", None) is not None:
            key = attn.norm_k(key)
        dtype, scale = query.dtype, query.shape[-1] ** -0.5
        if setting.attn_precision == "fp32":
            query, key, value, few = (t.float() for t in (query, key, value, few))
        out = agent_attention(
            query, key, value, few, scale=scale, query_scale=scale**setting.k_scale2, shortcut=setting.k_shortcut
        )
        out = attn.to_out[0](out.to(dtype).transpose(1, 2).flatten(2))
        return attn.to_out[1](out) / getattr(attn, "rescale_output_factor", 1.0)


def _attach(block: nn.Module, state: _State, stack: ExitStack) -> None:
    attn1: Any = block.attn1
    processor = _Processor(attn1.processor, state)
    attn1.processor = processor
    stack.callback(setattr, attn1, "processor", processor.original)

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # The residual stream is read before the norm, as the authors match it.
        processor.matching = state.match(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        processor.matching = None

    stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(end, always_call=True).remove)
    for name, option in (("attn2", "merge_crossattn"), ("ff", "merge_mlp")):
        part = getattr(block, name, None)
        if part is not None:
            _merge_around(part, option, processor, stack)


def _merge_around(part: nn.Module, option: str, processor: _Processor, stack: ExitStack) -> None:
    """Merge the first input of a module and unmerge its output, where the setting of the moment says so."""

    def count() -> int:
        setting, matching = processor.state.setting, processor.matching
        return matching.count(setting.ratio) if matching is not None and getattr(setting, option) else 0

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        gone, matching = count(), processor.matching
        if not gone or matching is None:
            return None
        if args:
            return (matching.merge(args[0], gone), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": matching.merge(kwargs["hidden_states"], gone)}

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        gone, matching = count(), processor.matching
        return matching.unmerge(output, gone) if gone and matching is not None else None

    stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(part.register_forward_hook(after).remove)


def _is_block(module: nn.Module) -> bool:
    attn = getattr(module, "attn1", None)
    parts = ("to_q", "to_k", "to_v", "to_out", "processor", "heads")
    return attn is not None and hasattr(module, "norm1") and all(hasattr(attn, part) for part in parts)
