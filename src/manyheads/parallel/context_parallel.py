"""Run and train a language model with its sequence sharded over ranks, from outside, without touching its code.

::

    with context_parallel(model, mesh, dim="cp"):
        model(input_ids=ids, labels=ids).loss.backward()          # ids: all N tokens, the same on these ranks

Everything in a language model but attention works on one token at a time. So a hook before the model leaves this rank
its N / W tokens, with their positions and the labels that follow them in the whole sequence; the model's attention
becomes ring attention, TokenRing or LASP-2(H); the loss is averaged over the tokens of all ranks; and gradients are
summed over the ranks that share a sequence. Loss and gradients are then those of one device, to rounding.

Source: "Sequence Parallelism: Long Sequence Training from System Perspective", arXiv 2105.13120; "TokenRing", arXiv
2412.20501; "LASP-2", arXiv 2502.07563.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from manyheads.data.cache_names import given_cache
from manyheads.engines.common import check_choice
from manyheads.parallel import seams
from manyheads.parallel.lasp2 import lasp2
from manyheads.parallel.lasp2h import lasp2h
from manyheads.parallel.layouts import LAYOUTS, position_ids, shard, unshard
from manyheads.parallel.ring_self_attention import ring_self_attention
from manyheads.parallel.token_ring import token_ring
from manyheads.parallel.wire import TIMEOUT, RankError, Wire, connect

METHODS = {"ring": ring_self_attention, "token_ring": token_ring, "lasp2h": lasp2h}
GRADIENTS = ("sum", "averaged")
IGNORED = -100  # the label that Hugging Face's losses skip


def context_parallel(
    model: nn.Module,
    mesh: Any = None,
    *,
    dim: str = "cp",
    method: str = "ring",
    layout: str | None = None,
    gradients: str = "sum",
    gather_logits: bool = False,
    timeout: int | float = TIMEOUT,
) -> ContextParallel:
    """Shard the sequence of a causal language model over ranks while the returned context is open.

    Every rank that shares a sequence calls the model as on one device, with all N tokens; other dimensions of the mesh
    hold other data. Positions that start anew mark packed sequences, as they do for transformers without a cache.
    Inside, ``loss`` is averaged over the labelled tokens of all ranks of the mesh (each data-parallel
    rank contributes what it has), and ``logits`` and hidden states are those of this rank's tokens.

    Args:
        model: a Hugging Face causal language model whose attention goes through ``AttentionInterface`` (also wrapped by
            PEFT; sliding windows, soft caps and sinks are known), or a module whose only mixing of tokens is in the
            library's linear layers (TNLAttention) and whose tensor arguments are (batch, N, ...). In a Hugging Face
            model linear layers may take the place of some attentions. DistributedDataParallel may wrap it before or
            after, ``fully_shard`` before.
        mesh: DeviceMesh, process group, or None for all ranks.
        dim: the dimension of a mesh of several over which the sequence is sharded.
        method: "ring" (ring attention), "token_ring" (TokenRing) or "lasp2h" (gathered keys and values); linear layers
            always compute LASP-2.
        layout: which tokens a rank holds, "contiguous", "zigzag" or "striped". None takes "zigzag", which balances
            causal work, and "contiguous" where there are linear layers, which need it.
        gradients: who adds up what the ranks of a sequence contribute to a parameter. "sum": this, before gradients are
            accumulated; DDP and FSDP then reduce over the other dimension. "averaged": a wrapper that averages over
            all ranks of the mesh (DDP over all ranks, FSDP over both dimensions); the loss makes up for the division.
        gather_logits: return the logits of all N tokens on every rank, in order.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        A context manager (:class:`ContextParallel`) that attaches on entry and leaves the model untouched on exit.

    Raises:
        TypeError: a model without attention that can be sharded.
        ValueError: an unknown method, layout or dimension; while the model runs, on all ranks: tokens that do not
            divide, inputs that differ between ranks, attention that the schemes lack (dropout, position biases,
            chunks), tokens that meet outside attention (convolutions, recurrent layers), a cache.
        RankError: a rank died, stalls or failed; the message names it.

    Source: arXiv 2105.13120, section 3; arXiv 2412.20501; arXiv 2502.07563, section 3.5.

    >>> import torch.distributed as dist
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    >>> ids = torch.randint(50, (2, 12))
    >>> with context_parallel(model):
    ...     sharded = model(input_ids=ids, labels=ids).loss
    >>> torch.testing.assert_close(sharded, model(input_ids=ids, labels=ids).loss)
    >>> dist.destroy_process_group()
    """
    check_choice("method", method, tuple(METHODS))
    check_choice("gradients", gradients, GRADIENTS)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    owner, linear = seams.pretrained(model), seams.linear_layers(model)
    if owner is None and not linear:
        raise TypeError(
            f"{type(model).__name__} is neither a Hugging Face model nor has it the library's linear layers: there is "
            "no attention to shard"
        )
    layout = layout or ("contiguous" if linear else "zigzag")
    check_choice("layout", layout, LAYOUTS)
    if linear and (layout != "contiguous" or method == "token_ring"):
        raise ValueError(
            f"method={method!r} with layout={layout!r}: linear layers need their tokens in order; take 'ring' or "
            "'lasp2h' with 'contiguous'"
        )
    if method == "token_ring" and layout == "contiguous":
        raise ValueError("method='token_ring' needs layout='zigzag' or 'striped' for causal attention")
    group, others = _groups(mesh, dim)
    return ContextParallel(model, group, others, method, layout, gradients, gather_logits, timeout)


@dataclass(frozen=True)
class _Batch:
    """What the attention must know of the sequences of a call."""

    tokens: int
    cu_seqlens: tuple[int, ...] | None
    key_mask: Tensor | None


class ContextParallel:
    """A model whose sequence is sharded, see :func:`context_parallel`; open it with ``with``.

    Source: arXiv 2105.13120.

    >>> context_parallel(torch.nn.Linear(3, 3))
    Traceback (most recent call last):
        ...
    TypeError: Linear is neither a Hugging Face model nor has it the library's linear layers: ...
    """

    def __init__(
        self, model: nn.Module, group: Any, others: list[Any], method: str, layout: str, gradients: str,
        gather_logits: bool, timeout: int | float,
    ):  # fmt: skip
        self.model, self.group, self.method, self.layout, self.timeout = model, group, method, layout, timeout
        self._others, self._gradients, self._gather_logits = others, gradients, gather_logits
        self._signature = inspect.signature(model.forward)
        self._batch: _Batch | None = None
        self._attended = False
        self._labels: tuple[Tensor, Any] | None = None
        self._attached: ExitStack | None = None

    def __enter__(self) -> ContextParallel:
        if self._attached is not None:
            raise RuntimeError("this context is open already")
        self._wire, _ = connect("context_parallel", self.group, self.timeout, self._settings)
        with ExitStack() as stack:
            owner = seams.pretrained(self.model)
            if owner is not None:
                stack.enter_context(seams.softmax_attention(owner, self._softmax))
            stack.enter_context(seams.linear_attention(seams.linear_layers(self.model), self._linear))
            if self._gradients == "sum":
                stack.enter_context(seams.summed_gradients(self.model, self._wire))
            before = self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True)
            stack.callback(before.remove)
            after = self.model.register_forward_hook(self._leave_model, with_kwargs=True)
            stack.callback(after.remove)
            failed = self.model.register_forward_hook(self._tell_failure, always_call=True)
            stack.callback(failed.remove)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        attached, self._attached = self._attached, None
        self._batch = self._labels = None
        if attached is not None:
            attached.close()

    def shard(self, tensor: Tensor, *, dim: int = 1) -> Tensor:
        """This rank's part of a tensor with all N tokens along ``dim``, in the order in which the model holds them.

        Source: arXiv 2105.13120, section 3.1.
        """
        return shard(tensor, self._wire.rank, self._wire.world, dim=dim, layout=self.layout)

    def unshard(self, tensor: Tensor, *, dim: int = 1) -> Tensor:
        """All N tokens, in order, from the parts of all ranks; call it on all of them.

        Differentiable, for losses that every rank computes alike on the whole.

        Source: arXiv 2105.13120, section 3.1.
        """
        same = {"shape to unshard": list(tensor.shape)}
        wire, _ = connect("context_parallel", self.group, self.timeout, lambda _: (same, None))
        return _Gather.apply(tensor, wire, dim, self.layout)

    def loss(self, logits: Tensor, labels: Tensor, *, shifted: bool = False, count: Any = None) -> Tensor:
        """Cross entropy of this rank's logits, averaged over the labelled tokens of all ranks of the mesh.

        Args:
            logits: (batch, N / W, vocabulary) of this rank.
            labels: (batch, N), -100 where there is none; the token itself, unless ``shifted`` says that every position
                already holds the token that follows it.
            count: what the sum over the ranks of this sequence is divided by, None for the number of labels.

        Returns:
            The same number on every rank.

        Source: arXiv 2105.13120, section 3.1.
        """
        following = labels if shifted else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        own = self.shard(following.to(logits.device))
        total = F.cross_entropy(logits.float().flatten(0, 1), own.flatten(), ignore_index=IGNORED, reduction="sum")
        found = torch.stack([total.detach().double(), (own != IGNORED).sum().double()])
        sequence = self._sum(found, self.group)
        everywhere = sequence
        for group in self._others:
            everywhere = self._sum(everywhere, group)
        factor = 1.0 if self._gradients == "sum" else float(self._wire.world)
        if count is not None:
            value = sequence[0] / count
            return _Total.apply(total, value.to(total.dtype), factor / float(count))
        value, tokens = everywhere[0] / everywhere[1].clamp(min=1), everywhere[1].clamp(min=1)
        # Averaging gradients over the other dimension divides by its size what was divided by all tokens already.
        return _Total.apply(total, value.to(total.dtype), factor * self._replicas / float(tokens))

    @property
    def _replicas(self) -> int:
        size = 1
        for group in self._others:
            size *= torch.distributed.get_world_size(group)
        return size

    def _settings(self, wire: Wire) -> tuple[dict[str, Any], None]:
        options = {"method": self.method, "layout": self.layout, "gradients": self._gradients}
        return options | {"gather_logits": self._gather_logits, "model": type(self.model).__name__}, None

    def _enter_model(self, model: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        named = self._signature.bind_partial(*args, **options)
        given = dict(named.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        wire, _ = connect("context_parallel", self.group, self.timeout, lambda wire: (self._check(wire, given), None))
        first = given[_first(given)]
        batch, tokens = first.shape[:2]
        for name in ("labels", "shift_labels", "num_items_in_batch"):
            given.setdefault(name, None)
        labels, shifted, count = (given.pop(name) for name in ("labels", "shift_labels", "num_items_in_batch"))
        target = labels if shifted is None else shifted
        self._labels = None if target is None else (target, (shifted is not None, count))
        cu_seqlens = key_mask = None
        if seams.pretrained(model) is not None:
            cu_seqlens, key_mask = _packs(given), _padding(given)
            given["attention_mask"] = None
            if given.get("position_ids") is None:
                where = position_ids(tokens, wire.rank, wire.world, layout=self.layout)
                given["position_ids"] = where.to(first.device)[None].expand(batch, -1)
            else:
                given["position_ids"] = self.shard(given["position_ids"])
            if self._accepts("use_cache"):
                given["use_cache"] = False
        self._batch, self._attended = _Batch(tokens, cu_seqlens, key_mask), False
        if _recomputes(model) and self._accepts("context_parallel"):
            # Recomputed in the backward pass, when the model may have seen another batch.
            given["context_parallel"] = self._batch
        return (), {
            name: self.shard(value)
            if isinstance(value, Tensor) and name != "position_ids" and value.shape[:2] == (batch, tokens)
            else value
            for name, value in given.items()
            if value is not None or name in named.arguments
        }

    def _check(self, wire: Wire, given: dict[str, Any]) -> dict[str, Any]:
        """What must be the same on all ranks of the sequence; errors for what cannot be sharded."""
        name = _first(given)
        tensor = given[name]
        if tensor.ndim < 2:
            raise ValueError(f"{name} must be (batch, tokens, ...), got shape {tuple(tensor.shape)}")
        tokens = tensor.shape[1]
        position_ids(tokens, wire.rank, wire.world, layout=self.layout)
        cache = given_cache(given)
        if given.get("use_cache") or (cache is not None and cache.get_seq_length()):
            raise ValueError(
                "a sharded sequence has no cache to generate from: pass whole sequences, or leave the with block first"
            )
        if not isinstance(given.get("logits_to_keep", 0), int) or given.get("logits_to_keep", 0):
            raise ValueError("logits_to_keep counts from the end of the sequence, which only one rank holds")
        owner = seams.pretrained(self.model)
        routed = getattr(owner and owner.config.get_text_config(), "output_router_logits", False)
        if given["output_router_logits"] if given.get("output_router_logits") is not None else routed:
            raise ValueError("output_router_logits: the routers' loss is not summed over the ranks")
        for label in ("labels", "shift_labels"):
            labels = given.get(label)
            if labels is not None and labels.shape != tensor.shape[:2]:
                raise ValueError(f"{label} must have shape {tuple(tensor.shape[:2])}, got {tuple(labels.shape)}")
        if owner is not None:
            seams.check_mixers(owner, tokens)
            if not self._accepts("position_ids"):
                raise ValueError(f"{type(self.model).__name__} takes no position_ids, so its tokens cannot be sharded")
            _check_rotary(owner.config.get_text_config(), tokens)
            _packs(given)
            _padding(given)
        same: dict[str, Any] = {f"shape of {name}": list(tensor.shape)}
        for key, value in given.items():
            if isinstance(value, Tensor) and not value.is_floating_point():
                same[key] = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes())
        return same

    def _leave_model(self, model: nn.Module, args: tuple, options: dict[str, Any], output: Any) -> Any:
        labels, self._labels = self._labels, None
        loss = None
        if not self._attended:
            raise ValueError(
                f"{type(model).__name__} never called its attention: its tokens meet elsewhere, or nowhere"
            )
        if isinstance(output, Tensor):
            if labels is not None:
                return self.loss(output, labels[0], shifted=labels[1][0], count=labels[1][1])
            return self.unshard(output) if self._gather_logits else output
        logits = output[0] if isinstance(output, tuple) else output.logits
        if labels is not None:
            loss = self.loss(logits, labels[0], shifted=labels[1][0], count=labels[1][1])
        if self._gather_logits:
            logits = self.unshard(logits)
        if isinstance(output, tuple):
            return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
        output.logits = logits
        if loss is not None:
            # Rebuilt, because in these outputs the first field that is set comes first.
            output = type(output)(**{**dict(output), "loss": loss})
        return output

    def _tell_failure(self, model: nn.Module, args: tuple, output: Any) -> None:
        problem = sys.exc_info()[1] if output is None else None
        # Bad input is refused on all ranks; anything else may have stopped this rank alone, and the others wait for it.
        if problem is not None and not isinstance(problem, (RankError, ValueError, TypeError)):
            self._wire._post({"error": f"{type(problem).__name__}: {problem}"})

    def _softmax(
        self, query: Tensor, key: Tensor, value: Tensor, given: seams.Given, passed: _Batch | None
    ) -> Tensor:  # fmt: skip
        batch, self._attended = passed or self._batch, True
        if batch is None:
            raise RuntimeError(
                "the inner parts of a sharded model, or a model that shares its configuration object, were called: "
                "call the model that was attached to"
            )
        out, lse = METHODS[self.method](
            query, key, value, group=self.group, causal=True, layout=self.layout, cu_seqlens=batch.cu_seqlens,
            scale=None if given.scale is None else float(given.scale), window=given.window, softcap=given.softcap,
            key_mask=batch.key_mask, return_lse=True, timeout=self.timeout,
        )  # fmt: skip
        if given.sinks is None:
            return out
        # A sink adds e^s to the softmax's denominator: of e^l, what it leaves is sigmoid(l - s).
        return out * torch.sigmoid(lse - given.sinks.to(lse.dtype)[:, None])[..., None].to(out.dtype)

    def _linear(
        self, query: Tensor, key: Tensor, value: Tensor, *, slopes: Tensor, initial_state: Tensor | None, backend: str,
        return_state: bool = False,
    ) -> Any:  # fmt: skip
        self._attended = True
        return lasp2(
            query, key, value, group=self.group, log_decay=-slopes, initial_state=initial_state,
            return_state=return_state, timeout=self.timeout,
        )  # fmt: skip

    def _accepts(self, name: str) -> bool:
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        return name in self._signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds

    def _sum(self, numbers: Tensor, group: Any) -> Tensor:
        wire, _ = connect("context_parallel loss", group, self.timeout, lambda _: ({}, None))
        with wire.guard():
            rows, pending = wire.all_gather(numbers, "loss")
            pending.wait()
        return rows.sum(0)


class _Total(torch.autograd.Function):
    """A number that is known already, whose gradient goes to this rank's part of it, times a factor."""

    @staticmethod
    def forward(ctx, own: Tensor, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, wire: Wire, dim: int, layout: str) -> Tensor:
        ctx.place = (wire.rank, wire.world, dim, layout)
        with wire.guard():
            rows, pending = wire.all_gather(tensor.contiguous().view(-1), "unshard")
            pending.wait()
        return unshard([row.view(tensor.shape) for row in rows], dim=dim, layout=layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rank, world, dim, layout = ctx.place
        return shard(grad, rank, world, dim=dim, layout=layout), None, None, None


def _groups(mesh: Any, dim: str) -> tuple[Any, list[Any]]:
    """The group that shares a sequence, and the groups of the mesh's other dimensions."""
    if not isinstance(mesh, DeviceMesh):
        return mesh, []
    if mesh.ndim == 1:
        return mesh.get_group(), []
    names = mesh.mesh_dim_names or ()
    if dim not in names:
        raise ValueError(f"dim={dim!r} is not a dimension of the mesh, which has {names or 'no names'}")
    return mesh.get_group(dim), [mesh.get_group(name) for name in names if name != dim]


def _first(given: dict[str, Any]) -> str:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(given.get(name), Tensor):
            return name
    for name, value in given.items():
        if isinstance(value, Tensor):
            return name
    raise ValueError("the model was called without a tensor of tokens")


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def _padding(given: dict[str, Any]) -> Tensor | None:
    """The keys that are real tokens, as booleans over the whole sequence; None where all are."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    shape = tuple(given[_first(given)].shape[:2])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must mark real tokens, with shape {shape}, got {got}")
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def _packs(given: dict[str, Any]) -> tuple[int, ...] | None:
    """Borders of sequences packed into one, which positions that start anew give away, as they do in transformers."""
    where = given.get("position_ids")
    if where is None or given.get("attention_mask") is not None:
        return None
    starts = (where.diff(dim=-1) != 1).nonzero()
    if not len(starts):
        return None
    if given[_first(given)].shape[0] != 1:
        raise ValueError("packed sequences (position_ids that start anew) need a batch of 1")
    return (0, *(int(start) + 1 for _, start in starts), where.shape[1])


def _check_rotary(config: Any, tokens: int) -> None:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
    limit = parameters.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", tokens)
    if kind in ("dynamic", "longrope") and tokens > limit:
        raise ValueError(
            f"rotary embeddings of type {kind!r} change beyond {limit} tokens with the length that a rank sees, got "
            f"{tokens} tokens"
        )
