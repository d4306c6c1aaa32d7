"""Where the parameters of one large model lie on several devices: rules from path to sharding."""

import re
from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The axes to split, the preferred one first. Outputs before inputs: Hugging Face stores a matrix by outputs, so the
# part of a device is one stretch of the file.
_AXES = {r"embed": (0, 1), r"unembed": (1, 0), r"blocks/(attn/[qkvo]|mlp/(gate|up|down))": (2, 1)}


def fsdp(mesh: Mesh, *, axis: str) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns the rule that splits every matrix over one mesh axis and copies vectors to all devices.

    From a parameter's path and shape comes its sharding. A matrix is split over its outputs (embeddings over the
    vocabulary), over its inputs where the devices do not divide those, and copied where they divide neither. The axes
    of the mesh should be ``AxisType.Auto``: programs here do not annotate their intermediates.

    Raises:
        ValueError: the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis: got {axis!r}, expected one of {', '.join(mesh.shape)}")

    def rule(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = next((axes for pattern, axes in _AXES.items() if re.fullmatch(pattern, path)), ())
        split = next((number for number in axes if shape[number] % mesh.shape[axis] == 0), None)
        spec = [axis if number == split else None for number in range(len(shape))]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return rule


def parameter_path(path: str) -> str | None:
    """Returns the parameter whose path ends another path, None if none of the rules does.

    ``opt_state/1/0/mu/blocks/attn/q``, of a moment in an optimiser's state, has ``blocks/attn/q``.
    """
    found = re.search(rf"(?:^|/)({'|'.join(_AXES)})$", path)
    return None if found is None else found[1]
