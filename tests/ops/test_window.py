"""Window attention: against attention on each window alone, masks, bad input."""

from __future__ import annotations

import pytest
import torch

from manyheads.ops.window import window_attention, window_merge, window_partition


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_each_window_alone(backend, dtype) -> None:
    query = torch.randn(2, 4, 6, 8, 5).to(dtype)
    key, value = torch.randn(2, 2, 6, 8, 5).to(dtype), torch.randn(2, 2, 6, 8, 5).to(dtype)
    out = window_attention(query, key, value, window=(3, 4), backend=backend)
    for x in (0, 3):
        for y in (0, 4):
            parts = [tensor[:, :, x : x + 3, y : y + 4].flatten(2, 3).double() for tensor in (query, key, value)]
            want = torch.nn.functional.scaled_dot_product_attention(*parts, enable_gqa=True)
            got = out[:, :, x : x + 3, y : y + 4].flatten(2, 3).double()
            tolerance = 1e-6 if dtype == torch.float64 else 2e-2
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_masked_keys_and_windows_without_keys() -> None:
    x = torch.randn(2, 3, 4, 8, 5, requires_grad=True)
    mask = torch.rand(2, 4, 8) > 0.4
    mask[1, :, 4:] = False
    outs = [window_attention(x, x, x, window=4, mask=mask, backend=backend) for backend in ("reference", "sdpa")]
    torch.testing.assert_close(*outs)
    assert (outs[0][1, :, :, 4:] == 0).all()
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_partition_and_merge_are_inverse() -> None:
    x = torch.randn(2, 3, 6, 8, 5)
    windows = window_partition(x, (2, 4))
    assert windows.shape == (12, 3, 8, 5)
    torch.testing.assert_close(windows[1], x[0, :, :2, 4:].flatten(1, 2))
    torch.testing.assert_close(window_merge(windows, (2, 4), (6, 8)), x)


def test_gradients_are_the_derivatives() -> None:
    x = torch.randn(1, 1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: window_attention(x, x, x, window=2), (x,))


def test_compiles_whole(compiling) -> None:
    x = torch.randn(1, 2, 4, 8, 5)
    attend = torch.compile(lambda x: window_attention(x, x, x, window=4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(attend(x), window_attention(x, x, x, window=4))


def test_bad_input_is_named() -> None:
    x = torch.randn(1, 2, 6, 8, 5)
    with pytest.raises(ValueError, match="windows of 4 x 4 do not divide a grid of 6 x 8"):
        window_attention(x, x, x, window=4)
    with pytest.raises(ValueError, match="window must be positive"):
        window_attention(x, x, x, window=0)
    with pytest.raises((ValueError, TypeError), match="mask"):
        window_attention(x, x, x, window=2, mask=torch.ones(1, 6, 8))
