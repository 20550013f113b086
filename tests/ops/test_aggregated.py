"""Aggregated attention against the equations written as loops, every path against the reference, and its promises."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engines.dense import attention
from manyheads.ops import aggregated
from manyheads.ops.aggregated import (
    aggregated_attention,
    length_scaled_cosine_attention,
    length_scaled_query,
    neighbours_inside,
)

LEARNT = ("temperature", "query_embedding", "bias_local", "bias_pool", "learnable_tokens", "learnable_bias")


def _case(height=4, width=3, heads=2, key_heads=2, dim=4, value_dim=4, pooled=2, window=3, dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (2, heads, height, width, dim),
        "key": (2, key_heads, height, width, dim),
        "value": (2, key_heads, height, width, value_dim),
        "pooled_key": (2, key_heads, pooled, dim),
        "pooled_value": (2, key_heads, pooled, value_dim),
        "temperature": (heads, 1, 1),
        "query_embedding": (heads, 1, dim),
        "bias_local": (heads, window**2),
        "bias_pool": (heads, height * width, pooled),
        "learnable_tokens": (heads, dim, window**2),
        "learnable_bias": (heads, 1, window**2),
    }
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def _by_hand(window: int, query, key, value, pooled_key, pooled_value, **learnt) -> torch.Tensor:
    batch, heads, height, width, _ = query.shape
    shared, reach = heads // key.shape[1], window // 2
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for x in range(height):
                for y in range(width):
                    unit = query[b, h, x, y] / query[b, h, x, y].norm()
                    near = [
                        (m, x + m // window - reach, y + m % window - reach)
                        for m in range(window**2)
                        if 0 <= x + m // window - reach < height and 0 <= y + m % window - reach < width
                    ]
                    keys = torch.stack([key[b, h // shared, i, j] for _, i, j in near] + [*pooled_key[b, h // shared]])
                    length = len(near) + pooled_key.shape[2]
                    scale = math.log(1 + math.exp(learnt["temperature"][h])) * math.log(length)
                    scores = (keys / keys.norm(dim=1, keepdim=True)) @ (unit + learnt["query_embedding"][h, 0]) * scale
                    bias = [learnt["bias_local"][h, m] for m, _, _ in near]
                    weights = (scores + torch.stack([*bias, *learnt["bias_pool"][h, x * width + y]])).softmax(0)
                    for n, (m, i, j) in enumerate(near):
                        extra = unit @ learnt["learnable_tokens"][h, :, m] + learnt["learnable_bias"][h, 0, m]
                        out[b, h, x, y] += (weights[n] + extra) * value[b, h // shared, i, j]
                    out[b, h, x, y] += weights[len(near) :] @ pooled_value[b, h // shared]
    return out


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    groups=st.integers(1, 2),
    shared=st.integers(1, 2),
    pooled=st.integers(1, 3),
    window=st.sampled_from([1, 3, 5]),
    backend=st.sampled_from(["reference", "joint", "merged"]),
)
def test_every_path_is_the_equation(height, width, groups, shared, pooled, window, backend) -> None:
    given = _case(height, width, groups * shared, groups, 4, 5, pooled, window)
    out = aggregated_attention(**given, window=window, backend=backend)
    torch.testing.assert_close(out, _by_hand(window, **given))


@pytest.mark.parametrize("backend", ["joint", "merged"])
def test_gradients_are_those_of_the_reference(backend: str) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in _case().items()}
    weight = torch.randn(2, 2, 4, 3, 4, dtype=torch.double)
    found, expected = (
        torch.autograd.grad((aggregated_attention(**given, backend=name) * weight).sum(), list(given.values()))
        for name in (backend, "reference")
    )
    torch.testing.assert_close(found, expected)


def test_gradients_are_numerically_right() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in _case(2, 2, pooled=1, dim=2, value_dim=2).items()}
    names, inputs = list(given), tuple(given.values())
    assert torch.autograd.gradcheck(lambda *x: aggregated_attention(**dict(zip(names, x))), inputs, fast_mode=True)


def test_long_inputs_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(aggregated, "SCORE_LIMIT", 1)
    monkeypatch.setattr(aggregated, "attention", lambda *x, **options: calls.append(1) or attention(*x, **options))
    given = _case()
    torch.testing.assert_close(aggregated_attention(**given), aggregated_attention(**given, backend="reference"))
    assert calls == [1]


def test_learnt_parts_can_be_left_away() -> None:
    given = {name: tensor for name, tensor in _case().items() if name not in LEARNT[1:]}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in _case().items() if name in LEARNT[1:]}
    torch.testing.assert_close(aggregated_attention(**given), aggregated_attention(**given, **zeros))


def test_corners_and_edges_count_their_neighbours() -> None:
    counts = neighbours_inside((4, 5), 3, torch.device("cpu")).sum(-1)
    assert counts[0].tolist() == [4, 6, 6, 6, 4]
    assert counts[1].tolist() == [6, 9, 9, 9, 6]


def test_the_query_is_scaled_by_the_log_of_the_length() -> None:
    unit = F.normalize(torch.randn(1, 2, 5, 8, dtype=torch.double), dim=-1)
    tau, embedding = torch.randn(2, 1, 1, dtype=torch.double), torch.randn(2, 1, 8, dtype=torch.double)
    expected = (unit + embedding) * F.softplus(tau) * math.log(100)
    torch.testing.assert_close(length_scaled_query(unit, tau, 100, embedding), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits(dtype: torch.dtype) -> None:
    given = _case(dtype=torch.float32)
    half = {name: tensor.to(dtype) for name, tensor in given.items()}
    out = aggregated_attention(**half)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), aggregated_attention(**given), rtol=0.05, atol=0.05)
    assert aggregated_attention(**half | {"temperature": half["temperature"] + 1e4}).isfinite().all()
    assert aggregated_attention(**half | {"query": 100 * half["query"]}).isfinite().all()


def test_strided_expanded_and_empty_inputs() -> None:
    given = _case(height=4, width=4)
    given["query"], given["key"] = given["query"].mT, given["key"].transpose(2, 3)
    solid = {name: tensor.contiguous() for name, tensor in given.items()}
    torch.testing.assert_close(aggregated_attention(**given), aggregated_attention(**solid))
    given["value"] = given["value"][:1].expand(2, -1, -1, -1, -1)
    solid["value"] = given["value"].clone()
    torch.testing.assert_close(aggregated_attention(**given), aggregated_attention(**solid))
    none = {name: tensor if name in LEARNT else tensor[:0] for name, tensor in given.items()}
    assert aggregated_attention(**none).shape == (0, 2, 4, 4, 4)


def test_without_pooled_keys_the_neighbourhood_remains() -> None:
    given = _case(pooled=0)
    joint = aggregated_attention(**given, backend="joint")
    torch.testing.assert_close(joint, aggregated_attention(**given, backend="reference"))


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    given = {name: tensor for name, tensor in _case().items() if name not in ("learnable_tokens", "learnable_bias")}
    several = torch.stack([aggregated_attention(**given, dropout=0.5) for _ in range(100)])
    assert not torch.equal(several[0], several[1])
    torch.testing.assert_close(several.mean(0), aggregated_attention(**given), rtol=0.3, atol=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "window=2 must be odd"),
        ({"temperature": torch.zeros(2)}, r"temperature must have shape \(2, 1, 1\), got \(2,\)"),
        ({"bias_pool": torch.zeros(2, 12, 3)}, r"bias_pool must have shape \(2, 12, 2\)"),
        ({"pooled_key": torch.zeros(2, 2, 2, 5)}, "pooled_key and pooled_value: .* must share a dtype|head_dim"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be in"),
        ({"dropout": 0.5, "backend": "merged"}, r"dropout=0\.5 must be in .* merged tile by tile"),
        ({"backend": "sdpa"}, "backend='sdpa'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        partial(aggregated_attention, **_case() | change)()


def test_maps_of_query_and_key_must_agree() -> None:
    given = _case()
    with pytest.raises(ValueError, match=r"query has a grid \(4, 3\) but key \(4, 2\)"):
        aggregated_attention(**given | {"key": given["key"][:, :, :, :2], "value": given["value"][:, :, :, :2]})


def _plain_case(dtype: torch.dtype = torch.double) -> dict[str, torch.Tensor]:
    shapes = {
        "query": (2, 4, 5, 6),
        "key": (2, 2, 7, 6),
        "value": (2, 2, 7, 3),
        "temperature": (4, 1, 1),
        "query_embedding": (4, 1, 6),
        "bias": (4, 5, 7),
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", ["auto", "reference", "blocked"])
def test_attention_to_everything_is_the_equation(backend: str) -> None:
    given = _plain_case()
    out = length_scaled_cosine_attention(**given, backend=backend)
    for b, h, n in itertools.product(range(2), range(4), range(5)):
        query, keys = given["query"][b, h, n], given["key"][b, h // 2]
        scaled = (query / query.norm() + given["query_embedding"][h, 0]) * F.softplus(given["temperature"][h])
        scores = (keys / keys.norm(dim=1, keepdim=True)) @ scaled[0] * math.log(7) + given["bias"][h, n]
        torch.testing.assert_close(out[b, h, n], scores.softmax(0) @ given["value"][b, h // 2])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_to_everything_has_right_gradients(backend: str) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in _plain_case().items()}
    names, inputs = list(given), tuple(given.values())

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return length_scaled_cosine_attention(**dict(zip(names, x)), backend=backend)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_to_everything_drops_weights(backend: str) -> None:
    given = _plain_case()
    several = torch.stack([length_scaled_cosine_attention(**given, dropout=0.5, backend=backend) for _ in range(300)])
    assert not torch.equal(several[0], several[1])
    torch.testing.assert_close(several.mean(0), length_scaled_cosine_attention(**given), rtol=0.3, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_to_everything_in_half_precision(dtype: torch.dtype) -> None:
    given = _plain_case(torch.float32)
    out = length_scaled_cosine_attention(**{name: tensor.to(dtype) for name, tensor in given.items()})
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), length_scaled_cosine_attention(**given), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(4, 5, 5)}, r"bias must have shape \(4, 5, 7\), got \(4, 5, 5\)"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be in"),
        ({"dropout": 0.5, "backend": "blocked"}, "dropout=0.5 must be .* 0 where backend='blocked'"),
        ({"backend": "joint"}, "backend='joint'"),
    ],
)
def test_attention_to_everything_refuses_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        length_scaled_cosine_attention(**_plain_case() | change)
