"""Attention layers (projections around an operator), one file per layer."""

from manyheads.layers.agent import AgentAttention, AgentStripeAttention
from manyheads.layers.biformer import BiLevelRoutingAttention
from manyheads.layers.conv_ffn import ConvFeedForward, ConvGLU
from manyheads.layers.cross_shaped import StripeAttention
from manyheads.layers.davit import ChannelAttention, ConvPositionEncoding, WindowAttention
from manyheads.layers.halo import HaloAttention
from manyheads.layers.hilo import DeformableMerging, HiLoAttention
from manyheads.layers.inline import InLineAttention, InLineStripeAttention
from manyheads.layers.lightning import TNLAttention
from manyheads.layers.maxvit import MBConv, MultiAxisAttention, PartitionAttention
from manyheads.layers.mixer_gate import MixerGating, TokenMixer
from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.layers.shifted_window import ShiftedWindowAttention
from manyheads.layers.shvit import SingleHeadAttention
from manyheads.layers.sparsifiner import ConnectivityPredictor, SparsifiedAttention
from manyheads.layers.spatial_reduction import SpatialReductionAttention
from manyheads.layers.spectral import SpectralGating
from manyheads.layers.transnext import AggregatedAttention, CosineAttention

__all__ = [
    "AgentAttention",
    "AgentStripeAttention",
    "AggregatedAttention",
    "BiLevelRoutingAttention",
    "ChannelAttention",
    "ConnectivityPredictor",
    "ConvFeedForward",
    "ConvGLU",
    "ConvPositionEncoding",
    "CosineAttention",
    "DeformableMerging",
    "HaloAttention",
    "HiLoAttention",
    "InLineAttention",
    "InLineStripeAttention",
    "MBConv",
    "MixerGating",
    "MultiAxisAttention",
    "NeighborhoodAttention",
    "PartitionAttention",
    "ShiftedWindowAttention",
    "SingleHeadAttention",
    "SparsifiedAttention",
    "SpatialReductionAttention",
    "SpectralGating",
    "StripeAttention",
    "TNLAttention",
    "TokenMixer",
    "WindowAttention",
]
