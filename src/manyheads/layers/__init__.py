"""Attention layers (projections around an operator), one file per layer."""
