"""Spectral gating: both paths against a circular convolution and the formula, and what the operator promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.spectral import resize_filter, spectral_gating


def _double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(height=st.integers(1, 7), width=st.integers(1, 8), channels=st.integers(1, 3))
def test_any_filter_is_the_formula(height: int, width: int, channels: int) -> None:
    x, weight = _double(2, height, width, channels), _double(height, width // 2 + 1, channels, 2)
    torch.testing.assert_close(spectral_gating(x, weight), spectral_gating(x, weight, backend="reference"))


@pytest.mark.parametrize("backend", ["fft", "reference"])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_the_filter_of_a_kernel_is_circular_convolution(backend: str, size: tuple[int, int]) -> None:
    kernel, x = _double(*size, 2), _double(1, *size, 2)
    weight = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    expected = torch.zeros_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            expected += kernel[i, j] * x.roll((i, j), (1, 2))
    torch.testing.assert_close(spectral_gating(x, weight, backend=backend), expected)


def test_imaginary_leftovers_are_discarded() -> None:
    # On the column of frequency zero only the part that a real kernel could have counts.
    x, weight = _double(1, 4, 4, 1), _double(4, 3, 1, 2)
    u = -torch.arange(4) % 4
    real = weight.clone()
    for column in (0, 2):
        part = torch.view_as_complex(weight[:, column].contiguous())
        real[:, column] = torch.view_as_real((part + part[u].conj()) / 2)
    torch.testing.assert_close(spectral_gating(x, weight), spectral_gating(x, real))


@pytest.mark.parametrize("backend", ["fft", "reference"])
def test_gradients(backend: str) -> None:
    x, weight = _double(1, 3, 4, 2).requires_grad_(), _double(3, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: spectral_gating(*given, backend=backend), (x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_came(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 6, 5, 4), torch.randn(6, 3, 4, 2)
    out = spectral_gating(x.to(dtype), weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), spectral_gating(x, weight), rtol=0.05, atol=0.05)
    assert spectral_gating(1e4 * x.to(dtype), 0.01 * weight).isfinite().all()


def test_strided_expanded_and_empty_inputs() -> None:
    x, weight = torch.randn(2, 4, 6, 5).permute(0, 2, 3, 1), torch.randn(2, 4, 3, 6).permute(3, 2, 1, 0)
    torch.testing.assert_close(spectral_gating(x, weight), spectral_gating(x.contiguous(), weight.contiguous()))
    one = torch.randn(1, 6, 5, 4).expand(3, -1, -1, -1)
    torch.testing.assert_close(spectral_gating(one, weight), spectral_gating(one.clone(), weight))
    assert spectral_gating(x[:0], weight).shape == (0, 6, 5, 4)
    assert spectral_gating(x[:, :0], weight[:0]).shape == (2, 0, 5, 4)


def test_resizing_keeps_corners_and_constants() -> None:
    weight = torch.randn(6, 4, 3, 2)
    resized = resize_filter(weight, (9, 10))
    assert resized.shape == (9, 6, 3, 2)
    torch.testing.assert_close(resized[::8, ::5], weight[::5, ::3])
    assert resize_filter(weight, (6, 7)) is weight
    torch.testing.assert_close(resize_filter(torch.ones(6, 4, 3, 2), (4, 4)), torch.ones(4, 3, 3, 2))


def test_compiles_whole(compiling: None) -> None:
    x, weight = torch.randn(1, 4, 4, 2), torch.randn(4, 3, 2, 2)
    compiled = torch.compile(spectral_gating, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), spectral_gating(x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 4, 4, 2), torch.ones(4, 4, 2, 2), r"map of 4 x 4 with 2 channels, which needs \(4, 3, 2, 2\)"),
        (torch.ones(1, 4, 5, 2), torch.ones(5, 3, 2, 2), "map of 4 x 5"),
        (torch.ones(1, 4, 4, 2), torch.ones(4, 3, 2, dtype=torch.complex64), "weight must be a real"),
    ],
)
def test_bad_input(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        spectral_gating(x, weight)
