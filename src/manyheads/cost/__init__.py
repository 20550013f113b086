"""Cost formulas of attention systems."""
