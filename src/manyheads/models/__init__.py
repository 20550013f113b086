"""Complete models with the authors' checkpoints; ``create_model`` and ``list_models`` reach them by name."""

from manyheads.models import moh_dit, vision  # registers the models
from manyheads.models.checkpoints import CheckpointError, load_checkpoint, read_state, save_checkpoint
from manyheads.models.registry import create_model, list_models

__all__ = [
    "CheckpointError",
    "create_model",
    "list_models",
    "load_checkpoint",
    "moh_dit",
    "read_state",
    "save_checkpoint",
    "vision",
]
