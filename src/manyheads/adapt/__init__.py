"""Changes to pretrained Hugging Face models: a method attaches in a `with` block and leaves no trace."""

from manyheads.adapt.agent_diffusion import AgentDiffusion
from manyheads.adapt.duo_attention import DuoAttention
from manyheads.adapt.duo_cache import DuoCache, live_bytes
from manyheads.adapt.duo_gates import optimise_gates
from manyheads.adapt.mixture_of_heads import MixtureOfHeads
from manyheads.adapt.sparsifiner import train_sparsifiner

__all__ = [
    "AgentDiffusion",
    "DuoAttention",
    "DuoCache",
    "MixtureOfHeads",
    "live_bytes",
    "optimise_gates",
    "train_sparsifiner",
]
