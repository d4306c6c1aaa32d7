"""The checkpoints of the pairs, for the command line about them."""

from tests.study.pairs.conftest import another, checkpoints, encoder, params

__all__ = ["another", "checkpoints", "encoder", "params"]
