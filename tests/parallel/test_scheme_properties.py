"""Random shapes, layouts, packs and worlds: every scheme equals one process."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parallel.rank_cases import linear_case, softmax_case

FEW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def softmax_options(draw):
    world, causal = draw(st.integers(2, 4)), draw(st.booleans())
    scheme = draw(st.sampled_from(["ring_self_attention", "token_ring", "lasp2h"]))
    layouts = ["zigzag", "striped"] if scheme == "token_ring" else ["contiguous", "zigzag", "striped"]
    layout = draw(st.sampled_from(layouts)) if causal else "contiguous"
    tokens = (2 * world if layout == "zigzag" else world) * draw(st.integers(1, 5))
    packed, kv_heads = draw(st.booleans()), draw(st.integers(1, 3))
    options = dict(world=world, causal=causal, layout=layout, tokens=tokens, kv_heads=kv_heads)
    options |= dict(heads=kv_heads * draw(st.integers(1, 3)), width=draw(st.integers(1, 9)))
    options |= dict(value_width=draw(st.integers(1, 9)), seed=draw(st.integers(0, 99)))
    if packed:
        cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
        options["cu_seqlens"] = [0, *cuts, tokens]
    else:
        options |= dict(batch=draw(st.integers(1, 2)), masked=draw(st.one_of(st.none(), st.integers(0, tokens))))
        if not causal:
            options["keys"] = world * draw(st.integers(1, 5))
            options["masked"] = None
    return scheme, options


@st.composite
def linear_options(draw):
    world, gates = draw(st.integers(2, 4)), draw(st.sampled_from(["none", "constant", "learned", "token", "channel"]))
    ragged = draw(st.lists(st.integers(0, 9), min_size=world, max_size=world))
    tokens, kv_heads = sum(ragged), draw(st.integers(1, 2))
    options = dict(world=world, gates=gates, ragged=ragged, tokens=tokens, kv_heads=kv_heads)
    options |= dict(heads=kv_heads * draw(st.integers(1, 2)), width=draw(st.integers(1, 6)))
    options |= dict(value_width=draw(st.integers(1, 6)), seed=draw(st.integers(0, 99)))
    if draw(st.booleans()) and tokens:
        cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
        options |= dict(batch=1, cu_seqlens=[0, *cuts, tokens])
    else:
        options |= dict(state=draw(st.booleans()), causal=gates != "none" or draw(st.booleans()))
    return options


def worst(results) -> float:
    return max(max(result["errors"].values()) for result in results if result is not None)


@FEW
@given(case=softmax_options())
def test_softmax_schemes_on_random_cases(four_ranks, case):
    assert worst(four_ranks.run(_softmax, *case)) < 2e-5


@FEW
@given(options=linear_options())
def test_lasp2_on_random_cases(four_ranks, options):
    assert worst(four_ranks.run(_linear, options)) < 5e-5


def _softmax(scheme, options):
    return softmax_case(scheme, **options)


def _linear(options):
    return linear_case("lasp2", **options)
