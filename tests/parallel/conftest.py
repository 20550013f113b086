"""Ranks for the tests of this room, started once: processes that join a gloo group and run functions of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from manyheads.parallel import LocalRanks
from tests.parallel.rank_cases import make_meshes

ROOT = str(Path(__file__).parents[2])
MODULES = (
    "manyheads.parallel.training",
    "manyheads.reproduce.byte_lm",
    "torch.distributed.fsdp",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen3.modeling_qwen3",
)


@pytest.fixture(scope="session")
def four_ranks():
    """Four ranks; smaller worlds are groups of some of them."""
    # The ranks import the test modules by name, as pytest names them.
    sys.path.insert(0, ROOT)
    try:
        with LocalRanks(4, timeout=300, preload=MODULES) as started:
            started.run(make_meshes)  # the imports take a minute on a busy machine
            started.timeout = 60.0
            yield started
    finally:
        sys.path.remove(ROOT)


@pytest.fixture
def one_rank():
    """This process as the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
