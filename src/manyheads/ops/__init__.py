"""Attention operators: pure functions on tensors, one file per operator."""
