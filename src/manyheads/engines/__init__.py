"""How attention is computed: five engines, each with CPU and GPU paths, shared by all operators."""

from manyheads.engines.blocksparse import blocksparse_attention
from manyheads.engines.blocksparse_plan import BlockPlan, TableBias
from manyheads.engines.dense import attention
from manyheads.engines.linear import linear_attention, linear_attention_step
from manyheads.engines.merge import grouped_softmax, merge
from manyheads.engines.select import select_attention, select_blocks, select_top_tokens

__all__ = [
    "BlockPlan",
    "TableBias",
    "attention",
    "blocksparse_attention",
    "grouped_softmax",
    "linear_attention",
    "linear_attention_step",
    "merge",
    "select_attention",
    "select_blocks",
    "select_top_tokens",
]
