"""What a compiled program needs of a device's memory, and what is free there: estimates that lanes are split by."""

import math
import os
from typing import Any

import jax

# XLA's plan leaves out what its libraries take for themselves while they run.
_USABLE = 0.9


def need(program: Any) -> int:
    """Returns the bytes that a compiled program takes on one device beside its arguments, as XLA plans them.

    Args:
        program: what ``jax.jit(f).lower(...).compile()`` returns.
    """
    plan = program.memory_analysis()
    # What is donated is an output already.
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def size(tree: Any) -> int:
    """Returns the bytes of arrays, or of what has their shapes, on the device that holds most of them.

    Args:
        tree: leaves with a ``sharding`` count with their part on one device.
    """
    return sum(math.prod(_part(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def free() -> int:
    """Returns the bytes that a program may take on the fullest device of this process.

    A CPU's devices share the machine's memory, and are taken to have equal parts of all of it.
    """
    return int(_USABLE * min(_free(device) for device in jax.local_devices()))


def _free(device: jax.Device) -> int:
    known = device.memory_stats()
    if known and "bytes_limit" in known:
        return known["bytes_limit"] - known["bytes_in_use"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
