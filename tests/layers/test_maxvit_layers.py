"""MaxViT's layers: padding, flavours, relative bias in its three forms, receptive fields."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads.layers.maxvit import Conv3x3, MBConv, MultiAxisAttention, PartitionAttention, Shortcut
from manyheads.layers.relative_bias import RelativeBiasMlp, RelativeBiasTable
from manyheads.ops.multi_axis import block_attention, grid_attention

OPERATORS = {"block": block_attention, "grid": grid_attention}


def _by_operator(layer: MultiAxisAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer as the operator on a map padded by hand."""
    height, width = x.shape[1:3]
    tall, wide = layer.partition
    mask = F.pad(torch.ones(x.shape[:3], dtype=torch.bool), (0, -width % wide, 0, -height % tall))
    x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % tall))
    order = (3, layer.heads, -1) if layer.heads_last else (layer.heads, 3, -1)
    slots = layer.qkv(x).unflatten(-1, order).unbind(3 if layer.heads_last else 4)
    q, k, v = (slot.permute(0, 3, 1, 2, 4) for slot in slots)
    bias = layer.rel_pos()
    # Read the table back out of the bias: every offset occurs in some pair.
    table = torch.zeros(layer.heads, 2 * tall - 1, 2 * wide - 1, dtype=x.dtype)
    for a in range(tall * wide):
        for b in range(tall * wide):
            table[:, b // wide - a // wide + tall - 1, b % wide - a % wide + wide - 1] = bias[:, a, b]
    out = OPERATORS[layer.axis](q, k, v, partition=layer.partition, bias_table=table, mask=mask)
    return layer.proj(out.permute(0, 2, 3, 1, 4).flatten(3))[:, :height, :width]


@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize("flavour", ["tf", "rw", "rmlp"])
@pytest.mark.parametrize("size", [(4, 6), (5, 4), (1, 1)])
def test_layer_is_the_operator_on_the_padded_map(axis: str, flavour: str, size: tuple[int, int]) -> None:
    layer = MultiAxisAttention(8, (2, 3), axis=axis, head_dim=4, flavour=flavour).double().eval()
    x = torch.randn(2, *size, 8, dtype=torch.double)
    torch.testing.assert_close(layer(x), _by_operator(layer, x))


def test_tables_of_both_orientations_agree() -> None:
    tf, flat = RelativeBiasTable((2, 3), 4), RelativeBiasTable((2, 3), 4, flavour="table")
    with torch.no_grad():
        for row in range(3):
            for column in range(5):
                entry = tf.relative_position_bias_table[:, row, column]
                flat.relative_position_bias_table[(2 - row) * 5 + 4 - column] = entry
    torch.testing.assert_close(tf(), flat())
    for bias in (tf, flat):
        bias.set_partition((3, 3))
    torch.testing.assert_close(tf(), flat())
    assert tf().shape == (4, 9, 9)


def test_mlp_bias_reads_logarithms_of_query_minus_key() -> None:
    bias = RelativeBiasMlp((2, 3), 2, hidden=16).eval()
    offset = torch.tensor([-(2.0**0) * torch.log(torch.tensor(2.0)), torch.log(torch.tensor(3.0))])
    torch.testing.assert_close(bias()[:, 2, 3], bias.mlp(offset))  # query (0, 2), key (1, 0)
    small = bias()
    bias.set_partition((4, 4))
    torch.testing.assert_close(bias()[:, 0, 5], small[:, 0, 4])


@pytest.mark.parametrize("flavour", ["tf", "rw", "rmlp"])
def test_set_partition_of_a_layer(flavour: str) -> None:
    layer = MultiAxisAttention(8, (2, 3), head_dim=4, flavour=flavour)
    layer.set_partition((3, 3))
    assert layer(torch.randn(1, 6, 6, 8)).shape == (1, 6, 6, 8)


def test_weights_are_dropped_in_training_only() -> None:
    layer = MultiAxisAttention(8, 2, head_dim=4, attn_drop=0.5)
    x = torch.randn(1, 3, 4, 8)
    assert not torch.equal(layer(x), layer(x))
    assert layer(x).isfinite().all()
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))
    few = MultiAxisAttention(8, 2, head_dim=4, attn_drop=1e-9)
    few.load_state_dict(layer.state_dict())
    torch.testing.assert_close(few(x), layer(x))


def test_half_block_is_two_residuals() -> None:
    half = PartitionAttention(8, 2, head_dim=4, layer_scale=0.5).eval()
    x = torch.randn(2, 3, 4, 8)
    # Padded positions are no keys, so norming before or after padding is the same.
    y = x + 0.5 * half.attn(half.norm1(x))
    torch.testing.assert_close(half(x), y + 0.5 * half.mlp(half.norm2(y)))


def test_stochastic_depth_drops_whole_images() -> None:
    torch.manual_seed(0)
    half = PartitionAttention(8, 2, head_dim=4, drop_path=0.5)
    x = torch.randn(64, 4, 4, 8)
    kept = (half(x) == x).flatten(1).float().mean(1)
    assert set(kept.tolist()) <= {0.0, 1.0}
    assert 0 < kept.mean() < 1


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (6, 7), (1, 2)])
def test_same_padding_is_tensorflows(size: tuple[int, int]) -> None:
    conv = Conv3x3(3, 4, stride=2, same=True)
    x = torch.randn(2, 3, *size)
    total = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in size]
    (top, below), (left, right) = [(t // 2, t - t // 2) for t in total]
    expected = F.conv2d(F.pad(x, (left, right, top, below)), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), expected)


def test_shortcut_leaves_padding_out_of_the_mean() -> None:
    pooled = Shortcut(1, 1, bias=True)(torch.ones(1, 1, 3, 5))
    torch.testing.assert_close(pooled, torch.ones(1, 1, 2, 3))


@pytest.mark.parametrize(("flavour", "hidden", "squeezed"), [("tf", 64, 4), ("rw", 32, 2)])
def test_mbconv_widths(flavour: str, hidden: int, squeezed: int) -> None:
    layer = MBConv(8, 16, stride=2, flavour=flavour)
    assert layer.conv1_1x1.out_channels == hidden
    assert layer.se.fc1.out_channels == squeezed
    assert (layer.conv3_1x1.bias is not None) == (flavour == "tf")


@pytest.mark.parametrize("layer", [PartitionAttention(8, 2, head_dim=4), MBConv(4, 4)])
def test_gradients(layer: nn.Module) -> None:
    shape = (1, 4, 4, 3) if isinstance(layer, MBConv) else (1, 3, 2, 8)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double().eval(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour", ["tf", "rmlp"])
def test_half_precision_stays_finite(dtype: torch.dtype, flavour: str) -> None:
    layer = PartitionAttention(8, 2, head_dim=4, flavour=flavour).to(dtype).eval()
    out = layer(100 * torch.randn(1, 3, 4, 8, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_layers_compile_whole(compiling: None) -> None:
    layer = PartitionAttention(8, 2, head_dim=4, axis="grid").eval()
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiAxisAttention(10, 2, head_dim=4), "dim=10 is not a multiple of head_dim=4"),
        (lambda: MultiAxisAttention(8, 2, head_dim=4, axis="ring"), "axis='ring'"),
        (lambda: MultiAxisAttention(8, 2, head_dim=4, flavour="pt"), "flavour='pt'"),
        (lambda: MultiAxisAttention(8, 0, head_dim=4), "partition must be positive"),
        (lambda: MultiAxisAttention(8, 2, head_dim=4)(torch.randn(1, 4, 4, 6)), r"input must be \(batch, X, Y, 8\)"),
        (lambda: MultiAxisAttention(8, 4, head_dim=4, pad=False)(torch.randn(1, 6, 8, 8)), "nearest sizes: 4 or 8"),
        (lambda: MBConv(8, 16), "stride is 2, or 1 at equal widths"),
        (lambda: RelativeBiasTable((2, 2), 1, flavour="rw"), "flavour='rw'"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
