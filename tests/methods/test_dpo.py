"""The loss of DPO on arrays, against NumPy and finite differences."""

import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from jaxsafety.methods import dpo

RTOL = 1e-6


def test_dpo_at_the_reference_is_log_two():
    zero = jnp.zeros(4)
    np.testing.assert_allclose(dpo.dpo(zero, zero, weight_chosen=0.3, weight_rejected=0.1), np.log(2), rtol=RTOL)


def test_dpo_matches_numpy_and_stays_finite_far_out():
    chosen, rejected = np.array([1.0, -2.0, 3e4]), np.array([0.5, 4.0, -3e4])
    logits = 0.3 * chosen - 0.1 * rejected
    expected = np.logaddexp(0, -logits)
    got = dpo.dpo(
        jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32), weight_chosen=0.3, weight_rejected=0.1
    )
    np.testing.assert_allclose(got, expected, rtol=RTOL)
    assert np.isfinite(dpo.dpo(jnp.float32([-3e4]), jnp.float32([3e4]), weight_chosen=1.0, weight_rejected=1.0)).all()


def test_dpo_gradients():
    def mean(chosen, rejected):
        # The finite differences come as NumPy arrays.
        margins = jnp.asarray(chosen), jnp.asarray(rejected)
        return jnp.sum(dpo.dpo(*margins, weight_chosen=0.7, weight_rejected=0.2))

    check_grads(mean, (jnp.asarray([0.3, -1.0]), jnp.asarray([1.0, 0.2])), order=1, modes=("rev",), rtol=1e-2)
