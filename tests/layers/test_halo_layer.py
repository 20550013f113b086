"""The halo layer: timm as oracle, odd blocks, padding, widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn

from manyheads.layers.halo import HaloAttention
from manyheads.ops.halo import halo_attention


@pytest.mark.parametrize(
    ("block", "halo", "stride", "extra"),
    [(4, 1, 1, {}), (4, 2, 2, {}), (3, 1, 2, {}), (4, 1, 1, {"dim_head": 4}), (4, 1, 2, {"qk_ratio": 0.5})],
)
def test_timm_computes_the_same_with_the_same_weights(block: int, halo: int, stride: int, extra: dict) -> None:
    shape = {"block_size": block, "halo_size": halo, "stride": stride, "num_heads": 2, "feat_size": (12, 24)}
    theirs = HaloAttn(16, 32, **shape, **extra).eval()
    renamed = {"head_dim" if name == "dim_head" else name: value for name, value in extra.items()}
    ours = HaloAttention(16, 32, block=block, halo=halo, stride=stride, heads=2, **renamed)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 12, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_maps_are_padded(hide: bool, stride: int) -> None:
    layer = HaloAttention(8, block=4, halo=1, heads=2, stride=stride, mask_padding=hide)
    x = torch.randn(1, 8, 5, 7)
    padded = F.pad(x, (0, 1, 0, 3))
    if hide:
        mask = F.pad(torch.ones(1, 5, 7, dtype=torch.bool), (0, 1, 0, 3))
        q, kv = layer._heads(layer.q(padded)), layer._heads(layer.kv(padded))
        tables = {"rel_height": layer.pos_embed.height_rel, "rel_width": layer.pos_embed.width_rel}
        out = halo_attention(
            q, kv[..., :4], kv[..., 4:], block=4, halo=1, stride=stride, mask=mask, mask_padding=True, **tables
        )
        expected = out.permute(0, 1, 4, 2, 3).flatten(1, 2)
    else:
        expected = layer(padded)
    torch.testing.assert_close(layer(x), expected[:, :, : -(-5 // stride), : -(-7 // stride)])


def test_gradients_and_half_precision() -> None:
    layer = HaloAttention(4, block=2, halo=1, heads=2, head_dim=2)
    x = torch.randn(1, 4, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double(), x)
    for dtype in (torch.bfloat16, torch.float16):
        out = layer.to(dtype)(100 * torch.randn(1, 4, 4, 4, dtype=dtype))
        assert out.dtype == dtype
        assert out.isfinite().all()


@pytest.mark.slow
def test_compiles_whole(compiling: None) -> None:
    layer = HaloAttention(8, block=2, halo=1, heads=2)
    x = torch.randn(1, 8, 4, 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HaloAttention(8, block=4, halo=1, heads=3), "heads=3 must divide"),
        (lambda: HaloAttention(8, block=0, halo=1), "block=0"),
        (lambda: HaloAttention(8, block=2, halo=-1), "halo=-1"),
        (lambda: HaloAttention(8, block=2, halo=1, stride=3), "stride=3"),
        (lambda: HaloAttention(8, block=2, halo=1)(torch.randn(1, 6, 4, 4)), r"input must be \(batch, 8, X, Y\)"),
        (lambda: HaloAttention(8, block=4, halo=1, pad=False)(torch.randn(1, 8, 4, 6)), "no multiple of the block"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
