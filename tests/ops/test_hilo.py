"""HiLo attention: both groups of heads against the equations written as loops, and what the operator promises."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.hilo import hilo_attention, low_head_count


def _by_hand(query, key, value, window: int, low: int) -> torch.Tensor:
    batch, heads, height, width, dim = query.shape
    out = torch.zeros(batch, heads, height, width, value.shape[-1], dtype=query.dtype)
    shared = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            q, k, v = query[b, h], key[b, h // shared], value[b, h // shared]
            means = [F.avg_pool2d(t.permute(2, 0, 1)[None], window)[0].flatten(1).T for t in (k, v)]
            for x in range(height):
                for y in range(width):
                    if window > 1 and h < heads - low:
                        top, left = x // window * window, y // window * window
                        tile = slice(top, top + window), slice(left, left + window)
                        keys, values = (t[tile].flatten(0, 1) for t in (k, v))
                    else:
                        keys, values = means
                    out[b, h, x, y] = (keys @ q[x, y] * dim**-0.5).softmax(0) @ values
    return out


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    window=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 2),
    low=st.integers(0, 3),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_both_groups_are_the_equations(rows, columns, window, groups, shared, low, backend) -> None:
    generator = torch.Generator().manual_seed(0)
    size = (rows * window, columns * window)
    query = torch.randn(2, groups * shared, *size, 4, dtype=torch.double, generator=generator)
    key = torch.randn(2, groups, *size, 4, dtype=torch.double, generator=generator)
    value = torch.randn(2, groups, *size, 5, dtype=torch.double, generator=generator)
    low = min(low, groups) * shared
    out = hilo_attention(query, key, value, window=window, low_heads=low, backend=backend)
    torch.testing.assert_close(out, _by_hand(query, key, value, window, low))


def test_window_one_is_ordinary_attention_whatever_the_split() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 7, 8)
    out = hilo_attention(q, k, v, window=1, low_heads=1)
    plain = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))
    torch.testing.assert_close(out.flatten(2, 3), plain)


def test_low_heads_alone_read_another_map() -> None:
    query = torch.randn(1, 2, 3, 5, 8)
    key = torch.randn(1, 2, 4, 6, 8)
    out = hilo_attention(query, key, key, window=2, low_heads=2)
    pooled = F.avg_pool2d(key.permute(0, 1, 4, 2, 3).flatten(0, 1), 2).unflatten(0, (1, 2)).flatten(3).mT
    expected = F.scaled_dot_product_attention(query.flatten(2, 3), pooled, pooled)
    torch.testing.assert_close(out.flatten(2, 3), expected)


def test_pooling_before_a_projection_is_pooling_after_it() -> None:
    project = torch.nn.Linear(6, 8).double()
    x = torch.randn(1, 1, 4, 4, 6, dtype=torch.double)
    pooled = F.avg_pool2d(x[0].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)[None]
    query = torch.randn(1, 1, 4, 4, 8, dtype=torch.double)
    after = hilo_attention(query, project(x), project(x), window=2, low_heads=1)
    before = hilo_attention(query, project(pooled), project(pooled), window=1, low_heads=1)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 4, 2, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda *qkv: hilo_attention(*qkv, window=2, low_heads=1, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 4, 6, 6, 8)
    out = hilo_attention(*(x.to(dtype) for x in (q, k, v)), window=3, low_heads=2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), hilo_attention(q, k, v, window=3, low_heads=2), rtol=0.05, atol=0.05)
    large = hilo_attention(*(x.to(dtype) for x in (q, k, v)), window=3, low_heads=2, scale=1e4)
    assert large.isfinite().all()


def test_strided_expanded_and_empty_inputs() -> None:
    x = torch.randn(2, 4, 8, 4, 6).permute(0, 1, 4, 3, 2)
    options = {"window": 2, "low_heads": 3}
    torch.testing.assert_close(hilo_attention(x, x, x, **options), hilo_attention(*[x.contiguous()] * 3, **options))
    one = torch.randn(1, 4, 6, 4, 8).expand(3, -1, -1, -1, -1)
    torch.testing.assert_close(hilo_attention(one, one, one, **options), hilo_attention(*[one.clone()] * 3, **options))
    assert hilo_attention(x[:0], x[:0], x[:0], **options).shape == (0, 4, 6, 4, 8)
    none = x[:, :, :0]
    assert hilo_attention(none, none, none, **options).shape == (2, 4, 0, 4, 8)
    assert hilo_attention(x, none, none, window=2, low_heads=4).eq(0).all()


def test_compiles_whole(compiling: None) -> None:
    q, k, v = torch.randn(3, 1, 4, 6, 6, 8)
    attend = partial(hilo_attention, window=2, low_heads=1)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.slow
def test_compiles_where_the_number_of_heads_is_left_open(compiling: None) -> None:
    # Stages of other widths make the compiler leave it open, and torch's attention wants a plain bool of it.
    attend = partial(hilo_attention, window=2, low_heads=1)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for heads in (4, 6):
        q, k, v = torch.randn(3, 1, heads, 6, 4, 8)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    ("heads", "alpha", "window", "low"),
    [(12, 0.9, 2, 10), (12, 0.7, 2, 8), (16, 0.9, 2, 14), (12, 0, 2, 0), (12, 1, 2, 12), (24, 0.5, 1, 24)],
)
def test_alpha_is_cut_off_not_rounded(heads: int, alpha: float, window: int, low: int) -> None:
    assert low_head_count(heads, alpha, window) == low


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 5, 4, 8), {"window": 2, "low_heads": 2}, "do not divide the query's grid of 5 x 4"),
        ((1, 4, 5, 4, 8), {"window": 2, "low_heads": 4}, "do not divide the key's grid of 5 x 4"),
        ((1, 4, 4, 4, 8), {"window": 0, "low_heads": 2}, "window must be at least 1"),
        ((1, 4, 4, 4, 8), {"window": 2, "low_heads": 5}, "low_heads=5 must be between 0 and the 4"),
        ((1, 4, 4, 4, 8), {"window": 2, "low_heads": 2, "backend": "flex"}, "backend='flex'"),
    ],
)
def test_bad_input(shape, options, message: str) -> None:
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        hilo_attention(x, x, x, **options)


def test_groups_of_heads_must_not_be_cut() -> None:
    query, key = torch.randn(1, 4, 4, 4, 8), torch.randn(1, 2, 4, 4, 8)
    with pytest.raises(ValueError, match="1 high heads cut a group of 2"):
        hilo_attention(query, key, key, window=2, low_heads=3)
    with pytest.raises(ValueError, match="another map can be read where all heads are low"):
        hilo_attention(query, key[:, :, :2], key[:, :, :2], window=2, low_heads=2)
    with pytest.raises(ValueError, match=r"alpha=1\.5 must be between"):
        low_head_count(4, 1.5, 2)
