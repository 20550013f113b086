"""Sequence parallelism on torch.distributed."""
