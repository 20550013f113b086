"""Attention layers (projections around an operator), one file per layer."""

from manyheads.layers.agent import AgentAttention, AgentStripeAttention
from manyheads.layers.biformer import BiLevelRoutingAttention
from manyheads.layers.conv_ffn import ConvFeedForward, ConvGLU
from manyheads.layers.cross_shaped import StripeAttention
from manyheads.layers.davit import ChannelAttention, ConvPositionEncoding, WindowAttention
from manyheads.layers.halo import HaloAttention
from manyheads.layers.hilo import DeformableMerging, HiLoAttention
from manyheads.layers.inline import InLineAttention, InLineStripeAttention
from manyheads.layers.latent import CrossLayer, LatentAttention, SelfLayer
from manyheads.layers.lightning import TNLAttention
from manyheads.layers.maxvit import MBConv, MultiAxisAttention, PartitionAttention
from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.layers.shifted_window import ShiftedWindowAttention
from manyheads.layers.shvit import SingleHeadAttention
from manyheads.layers.spatial_reduction import SpatialReductionAttention
from manyheads.layers.spectral import SpectralGating
from manyheads.layers.transnext import AggregatedAttention, CosineAttention

__all__ = [
    "AgentAttention",
    "AgentStripeAttention",
    "AggregatedAttention",
    "BiLevelRoutingAttention",
    "ChannelAttention",
    "ConvFeedForward",
    "ConvGLU",
    "ConvPositionEncoding",
    "CosineAttention",
    "CrossLayer",
    "DeformableMerging",
    "HaloAttention",
    "HiLoAttention",
    "InLineAttention",
    "InLineStripeAttention",
    "LatentAttention",
    "MBConv",
    "MultiAxisAttention",
    "NeighborhoodAttention",
    "PartitionAttention",
    "SelfLayer",
    "ShiftedWindowAttention",
    "SingleHeadAttention",
    "SpatialReductionAttention",
    "SpectralGating",
    "StripeAttention",
    "TNLAttention",
    "WindowAttention",
]
