"""The papers' claims as runnable checks, one file per system."""
