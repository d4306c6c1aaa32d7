"""The rule that splits parameters over devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxsafety.engine.sharding import fsdp


def mesh(*names):
    sizes = (4,) + (1,) * (len(names) - 1)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed", (48, 16), ("x", None)),
        ("embed", (49, 16), (None, "x")),
        ("unembed", (16, 48), (None, "x")),
        ("unembed", (16, 49), ("x", None)),
        ("blocks/attn/q", (3, 16, 24), (None, None, "x")),
        ("blocks/mlp/down", (3, 24, 18), (None, "x", None)),
        ("blocks/mlp/up", (4, 18, 22), (None, None, None)),
        ("blocks/attn/q_bias", (4, 24), (None, None)),
        ("blocks/norm_attn/scale", (4, 16), (None, None)),
        ("blocks/norm_q/scale", (4, 16), (None, None)),
        ("norm/scale", (16,), (None,)),
    ],
)
def test_matrices_are_split_where_the_devices_divide_them(path, shape, spec):
    assert fsdp(mesh("x", "y"), axis="x")(path, shape).spec == PartitionSpec(*spec)


def test_every_device_holds_its_share():
    sharding = fsdp(mesh("x"), axis="x")("embed", (48, 16))
    placed = jax.device_put(np.zeros((48, 16), np.float32), sharding)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(12, 16)}


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="axis: got 'z', expected one of x, y"):
        fsdp(mesh("x", "y"), axis="z")
