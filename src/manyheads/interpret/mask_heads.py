"""Switching single attention heads off: what a model can still do without them.

"Masked" has two meanings. In the retrieval-head code a masked head's scores are all zero, so it attends **uniformly**
and puts out the mean of the values it sees; it is not silenced. The other meaning is an output of **zero**.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.engines.common import accumulation_dtype, check_choice
from manyheads.interpret.attach import AttentionCall, attention_function, geometry, visible_keys

_ROWS = 512  # query rows whose visible keys are held at once


@contextmanager
def mask_heads(
    model: nn.Module,
    heads: Iterable[Any],
    *,
    mode: str = "uniform",
    prefill: bool = False,
    start: int | None = None,
) -> Iterator[None]:
    """Mask attention heads inside the ``with`` block.

    By default only decoding is touched: every query row that predicts a generated token, which is the last row of the
    call that fills the empty cache and every row of the calls after it. Rows of the prompt stay as they are.

    Args:
        model: a Hugging Face decoder.
        heads: (layer, head) pairs, counted in query heads.
        mode: "uniform" (all scores zero: the mean of the visible values) or "zero" (no output).
        prefill: mask all rows; the causal mask is kept.
        start: the column (padding included) from which rows are masked, instead of the last row of the first call: for
            a prompt that is fed in chunks, or for teacher forcing.

    Raises:
        ValueError: a head outside the model, an unknown mode, a negative start, or both prefill and start.
        RuntimeError: something is attached to the model already.

    Source: arXiv 2404.15574, section 4.1; "uniform" and "decoding only" are what the authors' code does.
    """
    check_choice("mode", mode, ("uniform", "zero"))
    if start is not None and (prefill or start < 0):
        raise ValueError(f"start={start} must be a column from 0 on, and cannot be combined with prefill=True")
    chosen: dict[int, list[int]] = {}
    for layer, head in geometry(model).check_heads(heads):
        chosen.setdefault(layer, []).append(head)

    def masked(
        call: AttentionCall, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = call.original(module, query, key, value, mask, **options)
        queries = query.shape[2]
        if prefill:
            first = 0
        elif start is not None:
            first = max(start - call.past, 0)
        else:
            first = 0 if call.past else queries - 1
        listed = chosen.get(call.layer)
        if not listed or first >= queries:
            return output, weights
        output = output.clone()
        weights = None if weights is None else weights.clone()
        values = value[:, torch.tensor(listed, device=value.device) // (query.shape[1] // value.shape[1])]
        for low in range(first, queries, _ROWS):
            rows = torch.arange(low, min(low + _ROWS, queries), device=query.device)
            share = _uniform(visible_keys(mask, queries, value.shape[2], rows), values) * (mode == "uniform")
            mean = (share @ values.to(share.dtype)).to(output.dtype)
            output[:, low : low + _ROWS, listed] = mean.expand(-1, -1, len(rows), -1).transpose(1, 2)
            if weights is not None:
                weights[:, listed, low : low + _ROWS] = share.to(weights.dtype)
        return output, weights

    with attention_function(model, masked):
        yield


def _uniform(seen: Tensor | None, values: Tensor) -> Tensor:
    wide = accumulation_dtype(values.dtype)
    if seen is None:
        return values.new_full((1, 1, 1, values.shape[2]), 1 / values.shape[2], dtype=wide)
    # A row of padding sees nothing: zeros.
    return seen.to(wide) / seen.sum(-1, keepdim=True).clamp(min=1)
