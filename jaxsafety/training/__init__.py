"""Optimisers, the pure step and the loop over steps; no model, method or world."""
