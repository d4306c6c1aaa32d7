"""Optimisers, the pure step, the loop over steps, and a method bound to a model; no concrete one of either."""
