"""Embedded and Hugging Face models, texts and images."""
