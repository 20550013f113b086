"""BiFormer's layers: the two formulations, padding, LePE, and what must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads.layers.biformer import AxialAttention, BiLevelRoutingAttention, ConvMixer, FullAttention


def test_formulations_agree_where_regions_divide_the_map() -> None:
    legacy = BiLevelRoutingAttention(16, 2, regions=4, topk=3)
    current = BiLevelRoutingAttention(16, 2, regions=4, topk=3, formulation="current")
    current.load_state_dict(legacy.state_dict())
    x = torch.randn(2, 8, 12, 16)
    torch.testing.assert_close(legacy(x), current(x))
    odd = torch.randn(2, 9, 13, 16)
    assert legacy(odd).shape == current(odd).shape == odd.shape
    assert not torch.allclose(legacy(odd), current(odd))


def test_legacy_padding_is_padding_the_input() -> None:
    layer = BiLevelRoutingAttention(16, 2, regions=4, topk=3)
    x = torch.randn(1, 7, 9, 16)
    torch.testing.assert_close(layer(x), layer(F.pad(x, (0, 0, 0, 3, 0, 1)))[:, :7, :9])


def test_lepe_of_full_attention_reads_what_it_is_told() -> None:
    x = torch.randn(1, 5, 6, 16)
    layers = {source: FullAttention(16, lepe=source) for source in ("input", "value", "none")}
    layers["value"].load_state_dict(layers["input"].state_dict())
    layers["none"].load_state_dict(layers["input"].state_dict(), strict=False)
    value = x @ layers["input"].qkv.weight[32:].T
    for source, read in (("input", x), ("value", value)):
        layer = layers[source]
        lepe = layer.lepe(read.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(layer(x) - layers["none"](x), lepe @ layer.proj.weight.T, atol=1e-5, rtol=1e-4)


def test_axial_attention_stays_in_its_row() -> None:
    layer = AxialAttention(8, 2, axis=1)
    x = torch.randn(1, 4, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, 2, 3].sum(), x)
    assert grad[0].abs().sum(-1).gt(0).nonzero()[:, 0].unique().tolist() == [2]


def test_learnt_router_trains_through_soft_routing() -> None:
    layer = BiLevelRoutingAttention(
        16, 2, regions=2, topk=2, qk_dim=8, param_routing=True, soft_routing=True, diff_routing=True,
        kv_downsample="ada_avgpool", kv_size=2,
    )  # fmt: skip
    layer(torch.randn(2, 8, 8, 16)).square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0
    assert ConvMixer(8)(torch.randn(1, 3, 2, 8)).shape == (1, 3, 2, 8)


def test_small_maps_lower_the_number_of_regions() -> None:
    layer = BiLevelRoutingAttention(16, 2, regions=7, topk=16, formulation="current")
    assert layer(torch.randn(1, 2, 3, 16)).shape == (1, 2, 3, 16)


def test_compiles(compiling) -> None:
    x = torch.randn(1, 9, 8, 16)
    layer = BiLevelRoutingAttention(16, 2, regions=4, topk=3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


BAD = [
    ({"heads": 3}, "dim=16 is not a multiple of heads=3"),
    ({"qk_dim": 9}, "qk_dim=9"),
    ({"topk": 50}, "topk=50"),
    ({"param_routing": True}, "param_routing=True needs diff_routing"),
    ({"diff_routing": True}, "diff_routing=True needs soft_routing"),
    ({"formulation": "new"}, "formulation='new'"),
    ({"kv_downsample": "conv"}, "kv_downsample='conv'"),
    ({"lepe_kernel": 4}, "lepe_kernel=4"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_name_themselves(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(16, **{"heads": 2, **options})


def test_indivisible_map_without_padding_is_refused() -> None:
    layer = BiLevelRoutingAttention(16, 2, regions=4, auto_pad=False)
    with pytest.raises(ValueError, match="regions=4 does not divide a map of 9 x 8"):
        layer(torch.randn(1, 9, 8, 16))
