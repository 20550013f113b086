"""Dynamic Perceiver's published layout, one for each of its three convolutional branches, and our names for it."""

from __future__ import annotations

from torch import nn

from manyheads.models.checkpoints import State, rename


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout of any of the three branches, renamed to ours; without the exits where the model has none."""
    state = rename(state, _OFFICIAL)
    if getattr(model, "exits", None) is None:
        state = {key: value for key, value in state.items() if not key.startswith("exits.")}
    return state


_OFFICIAL = [
    (r"(^|\.)(?:cross|self)_attn\.", r"\1"),
    (r"\.relative_position_bias$", ".key_table"),
    (r"^last_cross_att_z2x\.", "last_write."),
    (r"^early_classifier3\.", "exits.early."),
    (r"^classifier_att\.", "exits.latent."),
    (r"^classifier_(cnn|merge)\.", r"exits.\1."),
    (r"^isc([34])\.", r"exits.transfer\1."),
    (r"^cnn_stem\.", "stem."),
    *[(rf"^cnn_body\.block{s + 1}\.block{s + 1}-(\d+)\.", rf"stages.{s}.cnn.\1.") for s in range(4)],
    *[
        (rf"^{theirs}\.", f"stages.{s}.{ours}.")
        for s in range(4)
        for theirs, ours in (
            (f"dwc{s + 1}_x2z", "conv"),
            (f"cross_att{s + 1}_x2z", "read"),
            (f"cross_att{s + 1}_z2x", "write"),
            (f"self_att{s + 1}", "latent"),
            (rf"token_mixer\.{s - 1}", "shrink"),
            (rf"token_expander\.{s - 1}", "widen"),
            (f"cnn_body_stage{s + 1}", "cnn"),
        )
    ],
]
