"""The golden contract: for every system that works, a function ``(config, state, inputs) -> outputs``.

``config`` is the reference implementation's own configuration, ``state`` a state dict in the authors' layout, inputs
and outputs are dicts of arrays. Adapters call the public API only and serve every option that the spec sheets name:
``MANYHEADS_GOLDENS=FOLDER pytest tests/goldens`` runs further cases from any folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

Adapter = Callable[[dict, dict, dict], dict]


class _Adapters(dict):
    """Slug to adapter, imported on first use so that one system's tests do not import all the others."""

    def __getitem__(self, slug: str) -> Adapter:
        return importlib.import_module(f"tests.goldens.systems.{super().__getitem__(slug)}").run


ADAPTERS = _Adapters(
    agent_attention="agent_attention",
    dependency_vit="dependency_vit",
    dualtoken_vit="dualtoken_vit",
    inline_attention="inline_attention",
    davit="davit",
    dyn_perceiver="dyn_perceiver",
    litv2="litv2",
    spectformer="spectformer",
    transnext="transnext",
    halonet="halonet",
    maxvit="maxvit",
    ninformer="ninformer",
    medusa="medusa",
    moh="moh",
    shvit="shvit",
    tap_adl="tap_adl",
    sparsifiner="sparsifiner",
    biformer="biformer",
    neighborhood_attention="neighborhood_attention",
    lightning_attention="lightning_attention",
    lightning_attention_2="lightning_attention_2",
    retrieval_heads="retrieval_heads",
    duo_attention="duo_attention",
    ring_self_attention="ring_self_attention",
    token_ring="token_ring",
    lasp2="lasp2",
)
