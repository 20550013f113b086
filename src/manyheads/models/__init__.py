"""Complete models: vision backbones and language models, their registry and their checkpoints."""
