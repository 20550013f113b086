"""Streaming attention: its mask, every backend, decoding, compilation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.streaming import streaming_attention


def expected(query, key, value, sinks, recent):
    i = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    j = torch.arange(key.shape[2])[None]
    mask = (j <= i) & ((i - j < recent) | (j < sinks))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    keys=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    sinks=st.integers(0, 80),
    recent=st.integers(1, 150),
)
def test_sinks_and_recent_tokens(keys, share, sinks, recent) -> None:
    queries = max(1, int(keys * share))
    query = torch.randn(1, 4, queries, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, keys, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    want = expected(query, key, value, sinks, recent)
    grads = torch.autograd.grad(want.square().sum(), (query, key, value))
    for backend in ("reference", "tiles", "auto"):
        got = streaming_attention(query, key, value, sinks=sinks, recent=recent, backend=backend)
        torch.testing.assert_close(got, want)
        for have, should in zip(torch.autograd.grad(got.square().sum(), (query, key, value)), grads, strict=True):
            torch.testing.assert_close(have, should)


def test_half_precision() -> None:
    x = torch.randn(1, 2, 700, 16).bfloat16()
    got = streaming_attention(x, x, x, sinks=4, recent=100)
    torch.testing.assert_close(got.float(), expected(*(x.float(),) * 3, 4, 100), atol=3e-2, rtol=3e-2)


COMPILE = """
import torch
from manyheads.ops.streaming import streaming_attention
attend = lambda x: streaming_attention(x, x, x, sinks=3, recent=40)
x = torch.randn(1, 2, 700, 16, requires_grad=True)
out = torch.compile(attend, fullgraph=True, backend="aot_eager")(x)
torch.testing.assert_close(out, attend(x))
want = torch.autograd.grad(attend(x).square().sum(), x)[0]
torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], want, atol=1e-5, rtol=1e-5)
"""


def test_compiles_whole_with_gradients() -> None:
    # A fresh process: Dynamo cannot trace dataclasses that the run-time shape checks have wrapped.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": -1, "recent": 4}, "sinks"),
        ({"sinks": 1, "recent": 0}, "recent"),
        ({"sinks": 1, "recent": 4}, "more|place"),
    ],
)
def test_bad_input_is_named(options, message) -> None:
    query = torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match=message):
        streaming_attention(query, query[:, :, :5], query[:, :, :5], **options)
