"""Losses and regularisers that papers add to training."""
