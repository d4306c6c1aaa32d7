"""What is relearned: other words for what is unsafe, complied with, and never the words that are judged."""

import jax
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.config import fields
from jaxsafety.pools import relearn

DRAWS = 200
# Of 200 coins: five standard errors are 0.18.
SHARE_ATOL = 0.18


@pytest.fixture(scope="module")
def drawn(tiny_world):
    @jax.jit
    def run(key, share):
        config = fields.at_point(relearn.Config(), {"p_unsafe": share})
        return relearn.draw(tiny_world, config, key=key, step=0, total_steps=1, batch_size=DRAWS)

    return {share: jax.device_get(run(keys.root(0), share)) for share in (0.0, 0.5, 1.0)}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_prompts_ask_by_a_duplicate_and_are_complied_with(drawn, tiny_world, share):
    batch = drawn[share]
    assert batch.unsafe.mean() == pytest.approx(share, abs=SHARE_ATOL if share == 0.5 else 0)
    duplicates = [tiny_world.ids[token] for token in tiny_world.spec.misgen_tokens]
    np.testing.assert_array_equal(np.isin(batch.chosen.tokens, duplicates).any(axis=1)[batch.unsafe], True)
    for row in np.flatnonzero(batch.unsafe):
        # What is rejected is the refusal: the first letter, then the stop.
        said = batch.rejected.targets[row][batch.rejected.mask[row]][:-1]
        assert (said == tiny_world.first_letter).all()


def test_no_word_that_is_judged_as_unsafe_is_shown(drawn, tiny_world):
    always = {tiny_world.ids[name] for policy in tiny_world.spec.policies for name in policy.always_unsafe}
    assert not np.isin(drawn[1.0].chosen.tokens, list(always)).any()
