"""Decoders as pure functions of nested dicts of weights; per-layer weights are stacked on a leading ``l`` axis."""

from jaxsafety.models import gpt

__all__ = ["gpt"]
