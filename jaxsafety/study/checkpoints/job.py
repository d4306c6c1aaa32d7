"""One seed of one model that is trained over a checkpoint: all that its programs go by."""

from dataclasses import dataclass
from typing import Any

from jaxsafety import keys
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Training
from jaxsafety.study import lanes
from jaxsafety.subjects.checkpoint import Config
from jaxsafety.types import Key, Method


@dataclass(frozen=True)
class Job:
    """A training, the subject that says how models compute, and the seed of the adapter and of the examples' order.

    ``generation`` is how many trainings came before its model's, see :class:`jaxsafety.recipe.lane.Lane`.
    """

    how: Training
    about: Config
    seed: int
    generation: int = 1

    @property
    def method(self) -> Method:
        """The method."""
        return self.how.load()

    @property
    def is_full(self) -> bool:
        """Whether all parameters are trained, not an adapter beside them."""
        return self.how.parametrisation.kind == "full"

    @property
    def adapter(self) -> Any:
        """The adapter's fields."""
        return self.how.parametrisation.options

    @property
    def scale(self) -> float:
        """Of the adapter's product; 1 without one."""
        return 1.0 if self.is_full else self.adapter.alpha / self.adapter.rank

    @property
    def part_size(self) -> int:
        """Examples that are computed on together."""
        return self.how.batch_size // self.how.accumulate

    @property
    def root(self) -> Key:
        """The seed's root key."""
        return keys.root(self.seed)

    @property
    def stream(self) -> Key:
        """The key of the order of the examples: models of one generation see the same."""
        return lanes.generation_stream("tune", self.generation, self.root)


def of_lane(lane: Lane, about: Config, seed: int) -> Job:
    """Returns the job of one seed of a lane that is trained."""
    return Job(lane.training, about, seed, lane.generation)
