"""Lightning attention: the definition, slopes of every convention, states, bad input."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch

from manyheads.ops.lightning import lightning_attention, lightning_attention_step, lightning_slopes


@pytest.mark.parametrize("backend", ["auto", "reference", "recurrent", "chunked"])
@pytest.mark.parametrize("block", [1, 16, 100])
def test_follows_the_definition(backend, block):
    q, k, v = torch.randn(1, 4, 20, 5), torch.randn(1, 2, 20, 5), torch.randn(1, 2, 20, 3)
    slopes = [0.0, 0.5, 1.0, 3.0]
    want = torch.zeros(1, 4, 20, 3, dtype=torch.float64)
    for h in range(4):
        for i in range(20):
            for j in range(i + 1):
                weight = math.exp(-slopes[h] * (i - j)) * q[0, h, i].double() @ k[0, h // 2, j].double()
                want[0, h, i] += weight * v[0, h // 2, j].double()
    out = lightning_attention(q, k, v, slopes=slopes, block=block, backend=backend)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_cutting_and_stepping_are_exact():
    q, k, v = torch.randn(3, 2, 4, 90, 8, dtype=torch.float64).unbind()
    slopes = lightning_slopes(4)
    whole, final = lightning_attention(q, k, v, slopes=slopes, return_state=True)
    first, state = lightning_attention(q[:, :, :70], k[:, :, :70], v[:, :, :70], slopes=slopes, return_state=True)
    outs = [first]
    for i in range(70, 90):
        out, state = lightning_attention_step(*(x[:, :, i : i + 1] for x in (q, k, v)), state, slopes=slopes)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_noncausal_cross_has_no_decay():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 5)
    torch.testing.assert_close(lightning_attention(q, k, v, causal=False), q @ (k.transpose(-2, -1) @ v))


def test_slopes_of_the_authors_code():
    torch.testing.assert_close(lightning_slopes(4), torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]))
    six = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    torch.testing.assert_close(lightning_slopes(6), six)
    torch.testing.assert_close(lightning_slopes(4, layer=3, layers=12), lightning_slopes(4) * (1 - 3 / 11 + 1e-5))
    torch.testing.assert_close(lightning_slopes(4, layer=0, layers=1), lightning_slopes(4) * (1 + 1e-5))
    torch.testing.assert_close(lightning_slopes(1), torch.tensor([2.0**-8]))


def test_slopes_of_other_conventions():
    torch.testing.assert_close(
        lightning_slopes(4, layer=3, layers=12, rule="linear"), torch.tensor([0.0, 1.5, 3.0, 4.5])
    )
    six = torch.tensor([2 ** (-8 * (h + 1) / 6) for h in range(6)])
    torch.testing.assert_close(lightning_slopes(6, rule="minimax"), six)
    factor = 1 - 2 / (3 - 1 + 1e-5) + 1e-5
    torch.testing.assert_close(lightning_slopes(6, layer=2, layers=3, rule="minimax"), six * factor)


@pytest.fixture
def unchecked():
    """Without the run-time shape checks, so that the function's own messages are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(slopes=[0.1]), r"slopes must be .*\(2,\)"),
        (dict(slopes=[0.1, -0.1]), "slopes must be >= 0"),
        (dict(slopes=[0.1, math.nan]), "slopes must be >= 0"),
        (dict(slopes=[0.1, 0.1], causal=False), "slopes need causal=True"),
        (dict(block=0), "block must be at least 1"),
        (dict(initial_state=torch.zeros(1, 2, 4, 5)), r"\(1, 2, 4, 4\)"),
        (dict(cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must rise"),
    ],
)
def test_bad_options_are_refused(unchecked, options, message):
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match=message):
        lightning_attention(x, x, x, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=0), "heads must"),
        (dict(heads=4, layer=1), "go together"),
        (dict(heads=4, layer=4, layers=4), "layer=4 is outside 0 .. 3"),
        (dict(heads=4, layer=-1, layers=4), "outside"),
        (dict(heads=4, rule="alibi"), "'geometric'"),
    ],
)
def test_bad_slopes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lightning_slopes(**options)


def test_compiles(compiling):
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind()
    slopes = lightning_slopes(2)
    compiled = torch.compile(
        lambda q, k, v: lightning_attention(q, k, v, slopes=slopes), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), lightning_attention(q, k, v, slopes=slopes))
