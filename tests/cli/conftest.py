"""The checkpoints of the pairs, for the command line about them."""

from tests.study.pairs.conftest import encoder, params, checkpoints, another

__all__ = ["encoder", "params", "checkpoints", "another"]
