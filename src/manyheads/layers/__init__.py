"""Attention layers (projections around an operator), one file per layer."""

from manyheads.layers.agent import AgentAttention, AgentStripeAttention
from manyheads.layers.biformer import BiLevelRoutingAttention
from manyheads.layers.conv_ffn import ConvFeedForward, ConvGLU
from manyheads.layers.cross_shaped import StripeAttention
from manyheads.layers.davit import ChannelAttention, ConvPositionEncoding, WindowAttention
from manyheads.layers.dependency import MessageController, ReversedAttention
from manyheads.layers.dual_token import BiDimensionalAttention, PositionAwareTokens
from manyheads.layers.fan import FANBlock
from manyheads.layers.halo import HaloAttention
from manyheads.layers.hilo import DeformableMerging, HiLoAttention
from manyheads.layers.inline import InLineAttention, InLineStripeAttention
from manyheads.layers.latent import CrossLayer, LatentAttention, SelfLayer
from manyheads.layers.lightning import TNLAttention
from manyheads.layers.maxvit import MBConv, MultiAxisAttention, PartitionAttention
from manyheads.layers.medusa import GlobalAttention, MultiScaleHeads, ScaleHead
from manyheads.layers.mixer_gate import MixerGating, TokenMixer
from manyheads.layers.mixture_of_heads import HeadRouter, MixtureOfHeadsAttention, collect_routing
from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.layers.shifted_window import ShiftedWindowAttention
from manyheads.layers.shvit import SingleHeadAttention
from manyheads.layers.sparsifiner import ConnectivityPredictor, SparsifiedAttention
from manyheads.layers.spatial_reduction import SpatialReductionAttention
from manyheads.layers.spectral import SpectralGating
from manyheads.layers.tap import PooledNorm, TokenAwarePooling
from manyheads.layers.transnext import AggregatedAttention, CosineAttention

__all__ = [
    "AgentAttention",
    "AgentStripeAttention",
    "AggregatedAttention",
    "BiDimensionalAttention",
    "BiLevelRoutingAttention",
    "ChannelAttention",
    "ConnectivityPredictor",
    "ConvFeedForward",
    "ConvGLU",
    "ConvPositionEncoding",
    "CosineAttention",
    "CrossLayer",
    "DeformableMerging",
    "FANBlock",
    "GlobalAttention",
    "HaloAttention",
    "HeadRouter",
    "HiLoAttention",
    "InLineAttention",
    "InLineStripeAttention",
    "LatentAttention",
    "MBConv",
    "MessageController",
    "MixerGating",
    "MixtureOfHeadsAttention",
    "MultiAxisAttention",
    "MultiScaleHeads",
    "NeighborhoodAttention",
    "PartitionAttention",
    "PooledNorm",
    "PositionAwareTokens",
    "ReversedAttention",
    "ScaleHead",
    "SelfLayer",
    "ShiftedWindowAttention",
    "SingleHeadAttention",
    "SparsifiedAttention",
    "SpatialReductionAttention",
    "SpectralGating",
    "StripeAttention",
    "TNLAttention",
    "TokenAwarePooling",
    "TokenMixer",
    "WindowAttention",
    "collect_routing",
]
