"""The Triton kernels of the linear engine: natively on a GPU, through Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from manyheads.engines.linear import linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


def _run(tensors, backend, device="cpu", **options):
    leaves = {n: None if x is None else x.detach().clone().to(device).requires_grad_() for n, x in tensors.items()}
    out, state = linear_attention(**leaves, return_state=True, backend=backend, **options)
    ((out.float() * out.shape[-1]).square().sum() / 50 + (state * state.shape[-1]).sum()).backward()
    found = {"out": out, "state": state, **{f"grad_{n}": x.grad for n, x in leaves.items() if x is not None}}
    return {name: x.detach().double().cpu() for name, x in found.items()}


def _inputs(kind, tokens, head_dim, width, dtype=torch.float32, sequences=2, packed=False):
    batch = 1 if packed else sequences
    shapes = {"head": (2,), "token": (batch, 2, tokens)}
    return dict(
        query=torch.randn(batch, 2, tokens, head_dim).to(dtype),
        key=torch.randn(batch, 2, tokens, head_dim).to(dtype),
        value=torch.randn(batch, 2, tokens, width).to(dtype),
        log_decay=None if kind is None else -torch.rand(shapes[kind]) / 4,
        initial_state=torch.randn(sequences, 2, head_dim, width),
    )


def _compare(got, want, tolerance):
    for name in want:
        scale = want[name].abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            got[name] / scale, want[name] / scale, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", [None, "head", "token"])
@pytest.mark.parametrize(("tokens", "head_dim", "width"), [(37, 8, 20), (1, 16, 16), (32, 24, 70)])
def test_agrees_with_the_equation(kind, tokens, head_dim, width):
    tensors = _inputs(kind, tokens, head_dim, width)
    want = _run(tensors, "reference", scale=0.5)
    _compare(_run(tensors, "triton", DEVICE, scale=0.5, chunk=16), want, 2e-5)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_packed_sequences(kind):
    tensors = _inputs(kind, 40, 8, 8, sequences=4, packed=True)
    cu_seqlens = torch.tensor([0, 17, 17, 18, 40])
    want = _run(tensors, "reference", cu_seqlens=cu_seqlens)
    _compare(_run(tensors, "triton", DEVICE, cu_seqlens=cu_seqlens.to(DEVICE), chunk=16), want, 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    tensors = _inputs("head", 33, 16, 16, dtype)
    want = _run({n: x.float() for n, x in tensors.items()}, "reference")
    _compare(_run(tensors, "triton", DEVICE, chunk=16), want, tolerance)


def test_closed_gates_spoil_nothing():
    tensors = _inputs("token", 20, 8, 8)
    tensors["log_decay"][:, :, 5] = -torch.inf
    _compare(_run(tensors, "triton", DEVICE, chunk=16), _run(tensors, "reference"), 2e-5)


def test_no_tokens():
    tensors = _inputs("head", 0, 8, 8)
    out, state = linear_attention(**{n: x.to(DEVICE) for n, x in tensors.items()}, return_state=True, backend="triton")
    assert out.shape == (2, 2, 0, 8)
    assert torch.equal(state.cpu(), tensors["initial_state"])


def test_registered_correctly(compiling):
    from manyheads.engines.triton.linear import chunked_triton

    tensors = {n: x.to(DEVICE) for n, x in _inputs("token", 20, 8, 8).items()}
    leaves = [x.requires_grad_() for x in tensors.values()]
    torch.library.opcheck(chunked_triton, (*leaves, None, 1.0, 16, True), test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernels_do_not_serve_is_refused():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend='triton' needs float32"):
        linear_attention(x, x, x, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' needs causal"):
        linear_attention(x, x, x, backend="triton", causal=False)
