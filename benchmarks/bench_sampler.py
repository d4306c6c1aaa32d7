"""Samples per second of the world's draws, and of the plain generator beside them.

The accuracy column is the total variation distance of the letter bigrams that two generators draw; ``tv_noise`` is
what two draws of one generator, of the same sizes, show.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, harness, plain_sampler
from benchmarks.cases import SamplerCase
from benchmarks.harness import Program
from jaxsafety import keys, world
from jaxsafety.pools import text as pool
from jaxsafety.world import World
from jaxsafety.world.grammar import sample_window
from jaxsafety.world.spec import PRETRAIN_TRIM

COLUMNS = {
    "name": "draw", "items": "samples", "items_per_s": "samples/s", "median_ms": "median ms", "p10_ms": "p10",
    "p90_ms": "p90", "lower_ms": "lower ms", "compile_ms": "compile ms", "peak_mb": "peak MB", "speedup": "vs plain",
    "speedup_p10": "p10", "speedup_p90": "p90", "tv": "tv", "tv_noise": "tv noise",
}  # fmt: skip


def run() -> Iterator[dict[str, Any]]:
    """Yields a row for each case, the plain generator's first where there is one."""
    worlds = {name: world.load(name) for name in {case.world for case in cases.SAMPLER}}
    for case in cases.SAMPLER:
        yield from _rows(case, worlds[case.world])


def _rows(case: SamplerCase, built: World) -> Iterator[dict[str, Any]]:
    draw = draws(built, case.draw, batch_size=case.batch_size)
    name = f"{case.world} {case.draw}"
    options = {"name": name, "items": case.batch_size}
    if not case.peer_samples:
        yield asdict(harness.measure(draw, (keys.root(0),), rounds=case.rounds, **options))
        return
    fast = harness.compile_program(draw, (keys.root(0),), **options)
    rng = random.Random(0)
    plain = plain_draws(built, case.draw)
    slow = Program(f"{name}, plain", partial(plain, case.peer_samples, rng=rng), items=case.peer_samples)
    (baseline, _), (record, _) = harness.race([slow, fast], rounds=case.rounds)
    ratio = harness.speedup(record, over=baseline)
    yield asdict(baseline)
    yield asdict(record) | _accuracy(built, case.draw, plain(cases.STATISTIC_SAMPLES, rng=rng)) | {
        "speedup": ratio.median, "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
    }  # fmt: skip


def draws(built: World, name: str, *, batch_size: int) -> Callable[[jax.Array], Any]:
    """Returns the traceable draw of a batch, from a key: window letters ``[b, w]``, a batch, or a trial."""
    if name == "pretrain":
        return partial(_pretrain, built, batch_size=batch_size)
    if name != "text":
        return lambda key: world.batch_at(built, name, key=key, step=0, batch_size=batch_size)
    spec = built.spec

    def one(key: jax.Array) -> jax.Array:
        which, text = jax.random.split(key)
        pcfg = jax.random.randint(which, (), 0, len(spec.policies))
        return sample_window(
            built.grammars["full"], pcfg, key=text, min_window=spec.min_text, max_window=spec.max_text,
            trim=PRETRAIN_TRIM,
        )[0]  # fmt: skip

    return lambda key: jax.vmap(one)(jax.random.split(key, batch_size))


def _pretrain(built: World, key: jax.Array, *, batch_size: int) -> Any:
    return pool.draw(built, pool.Config(), key=key, step=0, total_steps=1, batch_size=batch_size)


def plain_draws(built: World, name: str) -> Callable[..., Any]:
    """Returns the plain generator's draw of ``text`` or ``pretrain``, from a count."""
    plain = plain_sampler.read(built)
    if name == "text":
        return partial(plain_sampler.texts, plain)
    return partial(plain_sampler.pretrain_batch, plain, pool.Config())


def _accuracy(built: World, draw: str, peer: Any) -> dict[str, float]:
    fast = jax.jit(draws(built, draw, batch_size=cases.STATISTIC_SAMPLES))
    first, second = (letter_bigrams(built, _letters(built, draw, fast(keys.root(seed)))) for seed in (1, 2))
    plain = letter_bigrams(built, _peer_letters(built, draw, peer))
    return {"tv": total_variation(plain, first), "tv_noise": total_variation(second, first)}


def _letters(built: World, draw: str, drawn: Any) -> np.ndarray:
    return np.asarray(drawn if draw == "text" else jnp.asarray(drawn.tokens) - built.first_letter)


def _peer_letters(built: World, draw: str, drawn: Any) -> np.ndarray:
    if draw == "pretrain":
        return drawn[0] - built.first_letter
    rows = np.full((len(drawn), built.spec.max_text), -1)
    for row, text in zip(rows, drawn, strict=True):
        row[: len(text)] = [built.spec.letters.index(letter) for letter in text]
    return rows


def letter_bigrams(built: World, rows: np.ndarray) -> np.ndarray:
    """Returns ``[a, a]`` frequencies of adjacent letters; ``rows`` holds letter indices, others are no letters."""
    count = len(built.spec.letters)
    left, right = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    both = (left >= 0) & (left < count) & (right >= 0) & (right < count)
    table = np.zeros((count, count))
    np.add.at(table, (left[both], right[both]), 1)
    return table / table.sum()


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Returns half the sum of absolute differences of two distributions, in [0, 1]."""
    return float(0.5 * np.abs(a - b).sum())
