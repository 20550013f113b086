"""How attention is computed: five engines, each with CPU and GPU paths, shared by all operators."""
