"""The token layout against a plain Python construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.world import layout
from jaxsafety.world.layout import Prompt
from tests.oracles import plain_outputs, plain_sequence


@pytest.fixture(params=["tiny", "paper"])
def world(request, tiny_world, paper_world):
    return {"tiny": tiny_world, "paper": paper_world}[request.param]


def some_prompt(world, length, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.full(world.spec.max_text, -1, np.int32)
    letters[:length] = rng.integers(0, len(world.spec.letters), length)
    tasks = rng.integers(0, len(world.spec.task_tokens), 4).astype(np.int32)
    pcfg = rng.integers(0, len(world.spec.policies))
    return Prompt(
        pcfg=jnp.int32(pcfg), tasks=jnp.asarray(tasks), letters=jnp.asarray(letters), length=jnp.int32(length)
    )


@pytest.mark.parametrize("end", ["min_text", "max_text"])
def test_sequence_is_the_definition(world, end):
    @jax.jit
    def sequence(prompt):
        first, second = (layout.letter_ids(world, block) for block in layout.outputs(world, prompt))
        return layout.sequence(world, prompt, block1=first, block2=second)

    prompt = some_prompt(world, getattr(world.spec, end))
    tokens, code = jax.device_get(sequence(prompt))
    expected = plain_sequence(world, prompt, *plain_outputs(world, prompt))
    assert [world.spec.tokens[i] for i in tokens] == expected
    assert int((code != layout.PAD).sum()) == 3 * int(prompt.length) + 10


def test_longest_sequence_fills_the_window(world):
    code = layout.segments(jnp.int32(world.spec.max_text), window=world.spec.max_text)
    assert code[-1] == layout.EOS
    assert code.shape[0] == world.max_tokens + 1


def test_paper_composition_check_vector(paper_world):
    """Letters 2b 2c 2h 2i 2j of PCFG 1 under { { and then { ( (published facts of the generator)."""
    ids = paper_world.ids
    letters = jnp.asarray([paper_world.spec.letters.index(x) for x in ["2b", "2c", "2h", "2i", "2j"]], jnp.int32)
    tasks = jnp.asarray([ids["{"], ids["{"], ids["{"], ids["("]], jnp.int32)
    prompt = Prompt(pcfg=jnp.int32(0), tasks=tasks, letters=letters, length=jnp.int32(5))
    names = [" ".join(paper_world.spec.letters[i] for i in block) for block in layout.outputs(paper_world, prompt)]
    assert names == ["2o 2v 2w 2g 2f", "2e 2t 2v 2n 2o"]


def test_nothing_is_scored_on_or_after_a_pad(tiny_world):
    prompt = some_prompt(tiny_world, 6)
    empty = layout.constant_block(tiny_world, prompt, "pad")
    null = layout.constant_block(tiny_world, prompt, tiny_world.spec.letters[0])
    tokens, code = layout.sequence(tiny_world, prompt, block1=null, block2=empty)
    batch = layout.shift(tiny_world, tokens, jnp.ones_like(code, bool))
    pad = tiny_world.special["pad"]
    assert not np.any(np.asarray(batch.mask) & (np.asarray(batch.targets) == pad))
    assert not np.any(np.asarray(batch.mask) & (np.asarray(batch.tokens) == pad))
    # What is left: everything up to the first stop (tasks included, since all was marked), and the end.
    assert int(batch.mask.sum()) == 4 + 1 + 6 + 1 + 6 + 1 + 1


def test_block_masks_are_letters_and_stop(tiny_world):
    code = layout.segments(jnp.int32(7), window=8)
    for block in (0, 1):
        places = np.flatnonzero(layout.block_mask(code, block))
        start = 14 + 8 * block
        np.testing.assert_array_equal(places, np.arange(start, start + 8))


def test_vmap_equals_loop(tiny_world):
    prompts = [some_prompt(tiny_world, length, seed=length) for length in (6, 7, 8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *prompts)

    def lay(prompt):
        blocks = [layout.letter_ids(tiny_world, block) for block in layout.outputs(tiny_world, prompt)]
        return layout.sequence(tiny_world, prompt, block1=blocks[0], block2=blocks[1])[0]

    batched = jax.jit(jax.vmap(lay))(stacked)
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(batched[i], lay(prompt))
