"""Halo attention against the equation written out position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.halo import halo_attention


def _by_hand(q, k, v, block, halo, heights, widths, stride, scaled, hide, mask):
    window, side, scale = block + 2 * halo, block // stride, q.shape[-1] ** -0.5
    rows, columns = k.shape[2:4]
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            for x in range(q.shape[2]):
                for y in range(q.shape[3]):
                    query, scores, values = q[n, h, x, y], [], []
                    for i in range(window):
                        for j in range(window):
                            a, b = x // side * block - halo + i, y // side * block - halo + j
                            inside = 0 <= a < rows and 0 <= b < columns
                            if (not inside and hide) or (inside and mask is not None and not mask[n, a, b]):
                                continue
                            term = query @ (heights[i - x % side + window - 1] + widths[j - y % side + window - 1])
                            content = query @ k[n, h // groups, a, b] if inside else query.new_zeros(())
                            scores.append(scale * content + (scale if scaled else 1) * term)
                            values.append(v[n, h // groups, a, b] if inside else v.new_zeros(v.shape[-1]))
                    if scores:
                        out[n, h, x, y] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


def _inputs(block, halo, grid, stride=1, heads=2, key_heads=2, dtype=torch.double):
    q = torch.randn(1, heads, grid[0] // stride, grid[1] // stride, 3, dtype=dtype)
    k, v = torch.randn(1, key_heads, *grid, 3, dtype=dtype), torch.randn(1, key_heads, *grid, 2, dtype=dtype)
    tables = [torch.randn(2 * (block + 2 * halo) - 1, 3, dtype=dtype) for _ in range(2)]
    return q, k, v, *tables


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(2, 1, (2, 4)), (2, 0, (4, 2)), (4, 1, (4, 4)), (1, 2, (2, 3)), (2, 3, (2, 2))]),
    strided=st.booleans(), key_heads=st.sampled_from([1, 2]), scaled=st.booleans(), hide=st.booleans(),
    masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_operator_is_the_equation(shape, strided, key_heads, scaled, hide, masked, seed) -> None:
    torch.manual_seed(seed)
    block, halo, grid = shape
    stride = 2 if strided and block % 2 == 0 else 1
    q, k, v, heights, widths = _inputs(block, halo, grid, stride, key_heads=key_heads)
    mask = torch.rand(1, *grid) < 0.4 if masked else None
    expected = _by_hand(q, k, v, block, halo, heights, widths, stride, scaled, hide, mask)
    for backend in ("reference", "blocks", "auto"):
        for grads in (False, True):
            with torch.set_grad_enabled(grads):
                out = halo_attention(
                    q, k, v, block=block, halo=halo, rel_height=heights, rel_width=widths, stride=stride,
                    scale_pos_embed=scaled, mask_padding=hide, mask=mask, backend=backend,
                )  # fmt: skip
            torch.testing.assert_close(out, expected)


def test_slabs_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, heights, widths = _inputs(2, 1, (8, 4))
    options = {"block": 2, "halo": 1, "rel_height": heights, "rel_width": widths, "mask_padding": True}
    expected = halo_attention(q, k, v, **options)
    monkeypatch.setattr("manyheads.ops.halo._SLAB", 1)
    with torch.no_grad():
        torch.testing.assert_close(halo_attention(q, k, v, **options), expected)


@pytest.mark.parametrize("hide", [False, True])
def test_gradients_reach_everything(hide: bool) -> None:
    tensors = [t.requires_grad_() for t in _inputs(2, 1, (4, 2), heads=1, key_heads=1)]

    def attend(q, k, v, heights, widths):
        return halo_attention(q, k, v, block=2, halo=1, rel_height=heights, rel_width=widths, mask_padding=hide)

    assert torch.autograd.gradcheck(attend, tensors)


def test_blocks_without_keys_give_zeros() -> None:
    x = torch.randn(1, 1, 4, 4, 2, requires_grad=True)
    out = halo_attention(x, x, x, block=2, halo=0, mask=torch.zeros(1, 4, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    assert not gradient.any()


def test_unused_rows_of_the_tables() -> None:
    q, k, v, heights, widths = _inputs(4, 2, (4, 4))
    heights.requires_grad_()
    halo_attention(q, k, v, block=4, halo=2, rel_height=heights, rel_width=widths).sum().backward()
    assert heights.grad is not None
    used = heights.grad.abs().sum(1) > 0
    assert used.tolist() == [False] * 4 + [True] * 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits(dtype: torch.dtype) -> None:
    tensors = _inputs(2, 1, (4, 6), dtype=dtype)
    names = ("rel_height", "rel_width")
    out = halo_attention(*tensors[:3], block=2, halo=1, **dict(zip(names, tensors[3:])))
    exact = halo_attention(*(t.double() for t in tensors[:3]), block=2, halo=1,
                           **dict(zip(names, (t.double() for t in tensors[3:]))))  # fmt: skip
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
    assert halo_attention(*(100 * t for t in tensors[:2]), tensors[2], block=2, halo=1).isfinite().all()


def test_strided_expanded_and_empty_inputs() -> None:
    x = torch.randn(2, 4, 6, 3, 8).permute(0, 3, 1, 2, 4)
    options = {"block": 2, "halo": 1}
    torch.testing.assert_close(halo_attention(x, x, x, **options), halo_attention(*[x.contiguous()] * 3, **options))
    one = torch.randn(1, 1, 4, 6, 8).expand(2, 3, -1, -1, -1)
    expected = halo_attention(x, *[one.contiguous()] * 2, **options)
    torch.testing.assert_close(halo_attention(x, one, one, **options), expected)
    assert halo_attention(x[:0], x[:0], x[:0], **options).shape == (0, 3, 4, 6, 8)


def test_compiles_whole(compiling: None) -> None:
    q, k, v, heights, widths = _inputs(2, 1, (4, 2))

    def attend(q, k, v):
        return halo_attention(q, k, v, block=2, halo=1, rel_height=heights, rel_width=widths, mask_padding=True)

    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3, "halo": 1}, "blocks of 3 x 3 do not divide a map of 4 x 8"),
        ({"block": 0, "halo": 1}, "block=0 must be at least 1"),
        ({"block": 2, "halo": -1}, "halo=-1 at least 0"),
        ({"block": 2, "halo": 1, "stride": 3}, "stride=3 must be 1, or 2"),
        ({"block": 1, "halo": 1, "stride": 2}, "even block, got block=1"),
        ({"block": 2, "halo": 1, "stride": 2}, r"query has a map of \(4, 8\), needs \(2, 4\)"),
        ({"block": 2, "halo": 1, "rel_height": torch.zeros(5, 3)}, r"head_dim\) = \(7, 3\)"),
        ({"block": 2, "halo": 1, "mask": torch.ones(1, 4, 8)}, "mask"),
        ({"block": 2, "halo": 1, "backend": "sdpa"}, "backend='sdpa'"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    x = torch.randn(1, 2, 4, 8, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        halo_attention(x, x, x, **options)
