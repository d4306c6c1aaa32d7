"""LAPACK on a CPU: batches are loops, and programs that would lock up with batched calls come to an end."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import unbatched

# float32 LAPACK against float64 LAPACK.
RTOL, ATOL = 2e-5, 2e-5


def stack(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 5, 3), (2, 3, 3, 5)])
def test_singular_values_are_numpys(shape):
    matrices = stack(*shape)
    got = unbatched.singular_values(matrices)
    np.testing.assert_allclose(got, np.linalg.svd(np.asarray(matrices, np.float64))[1], rtol=RTOL, atol=ATOL)


def test_bases_are_orthonormal_and_span_the_columns():
    columns = stack(2, 6, 3)
    basis = np.asarray(unbatched.orthonormal(columns), np.float64)
    np.testing.assert_allclose(basis.swapaxes(1, 2) @ basis, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=ATOL)
    np.testing.assert_allclose(basis @ (basis.swapaxes(1, 2) @ np.asarray(columns)), columns, rtol=RTOL, atol=ATOL)


def test_no_decomposition_gets_a_batch_on_a_cpu():
    """However often it is vmapped: the compiled program calls LAPACK for one matrix at a time."""
    mapped = jax.jit(jax.vmap(jax.vmap(unbatched.singular_values)))
    text = mapped.lower(stack(2, 3, 4, 6, 5)).as_text()
    calls = [line for line in text.splitlines() if "gesdd" in line]
    assert calls and all("tensor<6x5xf32>" in line for line in calls), calls
    batched = jax.jit(lambda a: jnp.linalg.svd(a, compute_uv=False)).lower(stack(4, 6, 5)).as_text()
    assert any("tensor<4x6x5xf32>" in line for line in batched.splitlines() if "gesdd" in line)


HANG = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from jaxsafety.engine import sweep
from jaxsafety.linalg import svd

def lane(a, _, __):
    return svd.decompose(a).values + svd.decompose(a + 1).values

program = jax.jit(sweep.over_lanes(lane, "sharded", seeds=4))
found = program(jax.random.normal(jax.random.key(0), (3, 4, 5, 64, 32)), jnp.zeros(4), jnp.zeros(3))
assert jnp.isfinite(found).all()
"""


def test_decompositions_on_several_devices_at_once_come_to_an_end():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HANG], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
