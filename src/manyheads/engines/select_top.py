"""The largest scores of every row, on CPUs: a vectorised partition finds the smallest that counts, one look the rest.

``torch.topk`` pays for the order of what it selects and takes several times as long.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from manyheads.engines.common import accumulation_dtype

ROWS = 512  # rows that are worth a thread of their own


@torch.library.custom_op("manyheads::top_positions", mutates_args=(), schema="(Tensor scores, int count) -> Tensor")
def top_positions(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest of each row (..., keys), ascending; in front -1 for scores of -inf."""
    keys = scores.shape[-1]
    rows = scores.detach().to(accumulation_dtype(scores.dtype)).reshape(-1, keys)
    parts = rows.chunk(max(1, min(torch.get_num_threads(), len(rows) // ROWS)))
    if len(parts) == 1:
        found = _positions(rows, count)
    else:
        with ThreadPoolExecutor(len(parts)) as threads:
            found = torch.cat(list(threads.map(lambda part: _positions(part, count), parts)))
    return found.view(*scores.shape[:-1], count)


@top_positions.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int64)


def _positions(rows: Tensor, count: int) -> Tensor:
    numbers, keys = rows.numpy(), rows.shape[1]
    least = np.partition(numbers, keys - count, axis=-1)[:, keys - count, None]
    large = (numbers >= least) & (least > -np.inf)
    found = np.flatnonzero(large)
    if found.size == len(numbers) * count and (large.sum(-1) == count).all():
        return torch.from_numpy(found).remainder_(keys).view(-1, count)
    # Equal scores at the edge, or fewer than count that are not -inf: those rows one by one.
    out = torch.empty(len(rows), count, dtype=torch.int64)
    plain = torch.from_numpy(large.sum(-1) == count)
    out[plain] = torch.from_numpy(np.flatnonzero(large[plain.numpy()])).remainder_(keys).view(-1, count)
    best, index = rows[~plain].topk(count, dim=-1, sorted=False)
    out[~plain] = index.masked_fill_(best == -torch.inf, -1).sort(dim=-1).values
    return out
