"""Decoders as pure functions of nested dicts of weights; per-layer weights are stacked on a leading ``l`` axis."""

from jaxsafety.models import generation, gpt, llama

__all__ = ["generation", "gpt", "llama"]
