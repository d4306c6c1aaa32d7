"""The tiny checkpoints that pairs are tested on are what is tuned here."""

from tests.study.pairs.conftest import checkpoints, encoder, params

__all__ = ["checkpoints", "encoder", "params"]
