"""Cached generation against the whole forward pass run again for every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxsafety import tree
from jaxsafety.models import generation, llama, llama_cache
from tests.models.llama_cases import MASK, PIECES, VARIANTS, config_of, params_of, tokens_of

SAME = 1e-5  # of the largest logit: the same sums in another order
BF16 = 2**-4  # of the largest logit: keys and values rounded to 8 bits, through two layers
NEW = 8

# Cached and whole agree for every variant but dynamic scaling, where a longer sequence turns all its keys anew.
CACHEABLE = [name for name in VARIANTS if name != "dynamic"]
REAL = np.ones_like(MASK)
begin = jax.jit(llama_cache.begin, static_argnames=("config", "room", "dtype"))
extend = jax.jit(llama_cache.extend, static_argnames="config")
forward = jax.jit(lambda *given, **asked: llama.apply(*given, **asked).logits, static_argnames="config")


@partial(jax.jit, static_argnames=("config", "count", "stop", "pad"))
def written(params, tokens, *, config, **asked):
    return generation.generate((params, llama.model(config)), tokens, **asked)


def generate(*given, **asked):
    return np.asarray(written(*given, **asked))


def _varied(config):
    """Weights that are large enough for continuations that differ from prompt to prompt."""
    return params_of(config, scale=1.5)


def _whole(params, tokens, real, config):
    """Logits of whole sequences, padded to the length of the longest that there are: one program."""
    more = ((0, 0), (0, MASK.shape[1] + NEW - tokens.shape[1]))
    padded, mask = np.pad(np.asarray(tokens), more), np.pad(real, more)
    return np.asarray(forward(params, padded, config=config, mask=mask))[:, : tokens.shape[1]]


def _plain(params, tokens, real, config, choose=lambda logits, i: np.argmax(logits, axis=-1)):
    """The continuations of prompts without padding before them, the whole sequences run again for every token."""
    texts = [row[own].tolist() for row, own in zip(np.asarray(tokens), real, strict=True)]
    for i in range(NEW):
        lengths = np.array([len(text) for text in texts])
        shown = np.arange(max(lengths)) < lengths[:, None]
        padded = np.zeros(shown.shape, np.int32)
        padded[shown] = np.concatenate(texts)
        logits = _whole(params, padded, shown, config)[np.arange(len(texts)), lengths - 1]
        for text, token in zip(texts, np.asarray(choose(logits, i)).tolist(), strict=True):
            text.append(token)
    return [text[-NEW:] for text in texts]


@pytest.mark.parametrize(
    "variant", [*CACHEABLE[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in CACHEABLE[3:])]
)
def test_greedy_is_the_whole_prompt_run_again_for_every_token(variant):
    config = config_of(variant)
    params, tokens = _varied(config), tokens_of()
    got = generate(params, tokens, config=config, count=NEW, mask=MASK)
    assert got.shape == (3, NEW)
    assert got.dtype == jnp.int32
    for b, expected in enumerate(_plain(params, tokens, MASK, config)):
        assert got[b].tolist() == expected, b
    assert len({tuple(row) for row in got.tolist()}) == 3


@pytest.mark.parametrize("variant", [*CACHEABLE, *PIECES])
def test_incremental_logits_are_the_whole_forwards(variant):
    config = config_of(variant)
    params, tokens = params_of(config), np.asarray(tokens_of(tokens=10))
    real = np.pad(MASK, ((0, 0), (0, 3)), constant_values=True)

    def whole(length):
        return _whole(params, tokens[:, :length], real[:, :length], config)

    logits, cache = begin(params, tokens[:, :7], config=config, mask=MASK, room=3, dtype="float32")
    prompt, last = whole(7), [np.flatnonzero(row)[-1] for row in MASK]
    np.testing.assert_allclose(logits, prompt[np.arange(3), last], atol=SAME * np.abs(prompt).max())
    for length in range(7, 10):
        logits, cache = extend(params, tokens[:, length], config=config, state=cache)
        expected = whole(length + 1)
        np.testing.assert_allclose(logits, expected[:, -1], atol=SAME * np.abs(expected).max())


def test_the_cache_holds_shared_heads_only():
    config = config_of("one key head", layers=3)
    _, cache = begin(params_of(config), tokens_of(), config=config, mask=MASK, room=5, dtype="bfloat16")
    assert cache.keys.shape == cache.values.shape == (3, 3, 12, 1, 4)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    mask = np.asarray(cache.mask)
    np.testing.assert_array_equal(mask[:, :7], MASK)
    assert mask[:, 7:].all()


@pytest.mark.parametrize("variant", ["plain", "dynamic"])
def test_a_bfloat16_cache_is_close(variant):
    config = config_of(variant)
    params, tokens = params_of(config), np.asarray(tokens_of())
    got = {}
    for dtype in ("float32", "bfloat16"):
        _, cache = begin(params, tokens, config=config, mask=MASK, room=3, dtype=dtype)
        got[dtype] = np.asarray(extend(params, tokens[:, 0], config=config, state=cache)[0])
    error = np.abs(got["bfloat16"] - got["float32"]).max()
    assert 0 < error <= BF16 * np.abs(got["float32"]).max()


def test_a_row_is_the_row_of_its_prompt_alone():
    config = config_of("dynamic")
    params, tokens = params_of(config), np.asarray(tokens_of())
    together = generate(params, tokens, config=config, count=NEW, mask=MASK)
    for b in range(3):
        alone = generate(params, tokens[b : b + 1], config=config, count=NEW, mask=MASK[b : b + 1])
        np.testing.assert_array_equal(alone[0], together[b])


def test_rows_end_with_their_stop_token():
    config = config_of()
    params, tokens = params_of(config), tokens_of()
    free = generate(params, tokens, config=config, count=NEW, mask=REAL)
    stops = (int(free[0, 2]), int(free[1, 0]))
    got = generate(params, tokens, config=config, count=NEW, stop=stops, pad=99)
    lengths = []
    for row, unstopped in zip(got.tolist(), free.tolist(), strict=True):
        first = next((i for i, token in enumerate(unstopped) if token in stops), NEW - 1)
        assert row == unstopped[: first + 1] + [99] * (NEW - first - 1)
        lengths.append(first + 1)
    assert len(set(lengths)) > 1


def test_the_loop_ends_when_every_row_has_stopped():
    """Counted by a callback in the step, which a stopped batch never reaches."""
    config, steps = config_of(), []
    params, tokens = params_of(config), tokens_of()

    def counted(*args, **options):
        jax.debug.callback(lambda: steps.append(1))
        return decoder.extend(*args, **options)

    model = llama.model(config)
    decoder = model.decoder
    model = model._replace(decoder=decoder._replace(extend=counted))
    run = partial(generation.generate, (params, model), tokens, count=NEW)
    jax.block_until_ready(jax.jit(lambda: run(stop=tuple(range(11))))())
    jax.effects_barrier()
    assert not steps
    jax.block_until_ready(jax.jit(run)())
    jax.effects_barrier()
    # The first token is the prompt's, and the last is not read.
    assert len(steps) == NEW - 1


def _loop(sources, rule, tokens, edit=None):
    """The continuation of prompts without padding, one whole pass of every source a token."""
    run = jax.jit(lambda text, at: rule([m.apply(p, text, at=at, edit=edit).logits[:, 0] for p, m in sources]))
    text = np.pad(np.asarray(tokens), ((0, 0), (0, NEW)))
    for place in range(tokens.shape[1], text.shape[1]):
        text[:, place] = np.asarray(run(text, np.full((len(text), 1), place - 1, np.int32))).argmax(-1)
    return text[:, tokens.shape[1] :]


def test_several_sources_are_combined_at_every_step():
    model, tokens, mask = llama.model(config_of()), tokens_of(), MASK
    first, second = (params_of(config_of(), seed, scale=1.5) for seed in (0, 1))
    # The same model without a cache.
    windowed = model._replace(decoder=generation.windowed(model.apply, max_tokens=16))

    def amplified(logits):
        return 2 * logits[0] - logits[1]

    sources = [(first, model), (second, windowed)]
    got = np.asarray(jax.jit(lambda tokens: generation.generate(sources, tokens, count=NEW, combine=amplified))(tokens))
    np.testing.assert_array_equal(got, _loop(sources, amplified, tokens))
    alone = generate(first, tokens, config=config_of(), count=NEW, mask=mask)
    assert (got != alone).any()
    twice = [(first, model), (first, windowed)]
    run = jax.jit(lambda tokens, mask: generation.generate(twice, tokens, count=NEW, mask=mask, combine=amplified))
    np.testing.assert_array_equal(run(tokens, mask), alone)


def test_an_edit_reaches_every_step_with_the_positions_of_the_whole_text():
    config = config_of("window")
    source, tokens = (_varied(config), llama.model(config)), tokens_of()

    def edit(site, layer, positions, h):
        return h * jnp.cos(positions + layer)[..., None] if site == "hook_resid_mid" else h

    got = np.asarray(jax.jit(lambda tokens: generation.generate(source, tokens, count=NEW, edit=edit))(tokens))
    np.testing.assert_array_equal(got, _loop([source], lambda logits: logits[0], tokens, edit))
    assert (got != generate(source[0], tokens, config=config, count=NEW, mask=REAL)).any()


def test_one_new_token_needs_no_room():
    config = config_of(max_tokens=7)
    params, tokens = params_of(config), tokens_of()
    got = generate(params, tokens, config=config, count=1)
    logits = np.asarray(forward(params, tokens, config=config))
    np.testing.assert_array_equal(got[:, 0], np.argmax(logits[:, -1], axis=-1))


def test_drawn_tokens_are_those_of_the_whole_forward_with_the_same_keys():
    config, key = config_of(), jax.random.key(3)
    params, tokens = params_of(config), tokens_of()
    drawn = jax.jit(lambda logits, i: jax.random.categorical(jax.random.fold_in(key, i), logits / 2.0))
    asked = {"config": config, "count": NEW, "mask": REAL, "temperature": 2.0}
    got = generate(params, tokens, key=key, **asked)
    assert got.tolist() == _plain(params, tokens, REAL, config, choose=drawn)
    assert got.tolist() != generate(params, tokens, key=jax.random.key(4), **asked).tolist()


def test_a_row_with_a_key_of_its_own_draws_what_it_draws_alone():
    config, keys = config_of(), jax.random.split(jax.random.key(3), len(MASK))
    params, tokens = _varied(config), tokens_of()
    asked = {"config": config, "count": NEW, "temperature": 2.0}
    got, back = (generate(params, tokens[order], mask=MASK[order], key=keys[order], **asked)
                 for order in (np.arange(len(MASK)), np.arange(len(MASK))[::-1]))  # fmt: skip
    assert got.tolist() == back[::-1].tolist()
    assert got.tolist() != generate(params, tokens, mask=MASK, key=keys[0], **asked).tolist()


def test_drawn_tokens_have_the_softmax_frequencies():
    config, rows, temperature = config_of(), 4000, 3.0
    params, tokens = params_of(config), np.tile(np.asarray(tokens_of(1)), (rows, 1))
    drawn = generate(params, tokens, config=config, count=1, key=jax.random.key(0), temperature=temperature)
    expected = softmax(_whole(params, tokens[:3], REAL, config)[0, -1] / temperature)
    counts = np.bincount(drawn[:, 0], minlength=11)
    # Five standard deviations of a binomial.
    assert (np.abs(counts / rows - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows) + 1e-9).all()


def test_a_low_temperature_is_greedy():
    config = config_of()
    params, tokens = params_of(config), tokens_of()
    greedy = generate(params, tokens, config=config, count=NEW, mask=REAL)
    cold = generate(params, tokens, config=config, count=NEW, mask=REAL, key=jax.random.key(0), temperature=1e-4)
    np.testing.assert_array_equal(cold, greedy)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(), (3, 5)])
def test_jit_is_eager_and_vmap_over_parameters_is_a_loop_over_seeds(stop):
    config, mask = config_of("dynamic"), jnp.asarray(MASK)
    seeds, key = [params_of(config, seed) for seed in range(3)], jax.random.key(0)

    def run(params, tokens):
        source = (params, llama.model(config))
        return generation.generate(source, tokens, count=NEW, mask=mask, stop=stop, key=key)

    batched = jax.jit(jax.vmap(run, in_axes=(0, None)))(tree.stack(seeds), tokens_of())
    looped = [jax.jit(run)(params, tokens_of()) for params in seeds]
    np.testing.assert_array_equal(batched, np.stack(looped))
    np.testing.assert_array_equal(run(seeds[0], tokens_of()), looped[0])


def test_a_prompt_of_padding_alone_disturbs_nobody():
    config = config_of("window")
    params, tokens = params_of(config), tokens_of()
    empty = MASK & (np.arange(3) > 0)[:, None]
    got = generate(params, tokens, config=config, count=NEW, mask=empty)
    np.testing.assert_array_equal(got[1:], generate(params, tokens, config=config, count=NEW, mask=MASK)[1:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cache_is_held_once_and_one_layer_is_widened(dtype):
    config = config_of(layers=8, width=64, mlp_width=256, head_width=16, max_tokens=4096)
    params = jax.eval_shape(partial(params_of, config, dtype=dtype))
    tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    memory = written.lower(params, tokens, config=config, count=1000).compile().memory_analysis()
    cache = 2 * 4 * 8 * (5 + 999) * 2 * 16
    layer = sum(4 * leaf.size for leaf in jax.tree.leaves(params["blocks"])) / 8
    assert cache < memory.temp_size_in_bytes < cache + 3 * layer


def test_bad_requests_are_named(unchecked):
    config = config_of()
    source = (params_of(config), llama.model(config))
    for options, message in [
        ({"count": 0}, "count: got 0, expected at least 1"),
        ({"count": 11}, "tokens: got 7 and 10 to come, expected at most max_tokens 16"),
        ({"count": 2, "temperature": 0.7}, "temperature: got 0.7 without a key"),
        ({"count": 2, "temperature": 0.0, "key": jax.random.key(0)}, "temperature: got 0.0, expected a number great"),
    ]:
        with pytest.raises(ValueError, match=message):
            generation.generate(source, tokens_of(), **options)
    with pytest.raises(ValueError, match=r"unknown cache_dtype 'bf16'.*float32, bfloat16"):
        llama.model(config, cache_dtype="bf16")
    for sources, count in (([source, source], 2), ([], 0)):
        with pytest.raises(ValueError, match=f"sources: got {count} and no rule, expected one, or combine"):
            generation.generate(sources, tokens_of(), count=1)
