"""Where the parts of a training lie: on one device, or over all devices of this process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsafety.engine import sharding

_AXIS = "fsdp"


@dataclass(frozen=True)
class Places:
    """The places on some devices.

    Attributes:
        mesh: the devices along one axis; None for a single one, on which nothing needs a place.
    """

    mesh: Mesh | None

    @cached_property
    def rule(self) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
        """From a parameter's path and shape to its place."""
        return None if self.mesh is None else sharding.fsdp(self.mesh, axis=_AXIS)

    @property
    def everywhere(self) -> NamedSharding | None:
        """A copy on every device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def sequences(self, rows: int) -> NamedSharding | None:
        """Sequences in equal parts; None where the devices do not divide their number."""
        if self.mesh is None or rows % self.mesh.size:
            return None
        return NamedSharding(self.mesh, PartitionSpec(_AXIS, None))

    def copied(self, shapes: Any) -> Any:
        """Returns shapes with their place, which is everywhere."""
        return jax.tree.map(lambda leaf: _shape(leaf, self.everywhere), shapes)

    def split(self, shapes: Any) -> Any:
        """Returns shapes of parameters and of what an optimiser keeps of each, with their places.

        A leaf goes with the parameter whose path its own ends with, else everywhere.
        """

        def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            name = sharding.parameter_path(jax.tree_util.keystr(path, simple=True, separator="/"))
            return _shape(leaf, self.everywhere if name is None or self.rule is None else self.rule(name, leaf.shape))

        return jax.tree.map_with_path(one, shapes)


def local() -> Places:
    """Returns the places on all devices of this process."""
    devices = jax.local_devices()
    several = len(devices) > 1
    return Places(jax.make_mesh((len(devices),), (_AXIS,), axis_types=(AxisType.Auto,)) if several else None)


def of(shapes: Any) -> Any:
    """Returns the places of shapes; None for those that have none."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _shape(leaf: Any, place: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
