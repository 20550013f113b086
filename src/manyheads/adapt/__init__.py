"""Changes to pretrained Hugging Face models: a method attaches in a `with` block and leaves no trace."""
