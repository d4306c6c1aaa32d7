"""The checkpoints of the studies of checkpoints, for the command line about them."""

from tests.study.checkpoints.conftest import another, checkpoints, encoder, pairs, params

__all__ = ["another", "checkpoints", "encoder", "pairs", "params"]
