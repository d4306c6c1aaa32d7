"""Sensitivities of a GPT's first answer token: matrix-free against what forms the Jacobian.

The baseline forms every prompt's Jacobian row by row and takes its SVD. ``value_error`` is the largest relative error
against it: of the spectral norm, or of the gradient norm against the norm of the Jacobian's row of the top logit.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cases, harness
from benchmarks.cases import SensitivityCase
from jaxsafety import keys, world
from jaxsafety.linalg import sensitivity
from jaxsafety.linalg.unbatched import singular_values
from jaxsafety.models import gpt

COLUMNS = {
    "name": "program", "items": "prompts", "items_per_s": "prompts/s", "median_ms": "median ms", "p10_ms": "p10",
    "p90_ms": "p90", "lower_ms": "lower ms", "compile_ms": "compile ms", "peak_mb": "peak MB", "speedup": "speed-up",
    "speedup_p10": "p10", "speedup_p90": "p90", "over": "over", "value_error": "value error",
}  # fmt: skip

# Weights of a fresh model are so small that its logits hardly depend on the prompt.
_SCALE = 3.0


def run() -> Iterator[dict[str, Any]]:
    """Yields the rows of every case, the dense Jacobian's first."""
    for case in cases.SENSITIVITY:
        yield from _rows(case)


def _rows(case: SensitivityCase) -> Iterator[dict[str, Any]]:
    built = world.load(case.world)
    config = gpt.preset(case.preset, vocab_size=built.vocab_size, max_tokens=built.max_tokens)
    params = jax.tree.map(lambda leaf: _SCALE * leaf, gpt.init(config, key=keys.root(0)))
    model = gpt.model(config)
    drawn = world.batch_at(built, "unsafe", key=keys.root(1), step=0, batch_size=case.prompts)
    at = world.layout.last_prompt_index(drawn.prompt.length)
    embeddings = model.embed(params, drawn.complied.tokens)
    prompt = jnp.arange(embeddings.shape[1])[None, :] < at[:, None]

    def forward(embeddings: jax.Array) -> jax.Array:
        return model.apply(params, embeddings).logits

    def dense(embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(given: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            row, position, varied = given
            top = lambda row: forward(row[None])[0, position]  # noqa: E731
            jacobian = jnp.where(varied[None, :, None], jax.jacrev(top)(row), 0.0).reshape(built.vocab_size, -1)
            return singular_values(jacobian)[0], jnp.linalg.norm(jacobian[jnp.argmax(top(row))])

        return jax.lax.map(one, (embeddings, at, prompt))

    shared = {"position": at, "prompt": prompt}
    programs = {
        f"{case.preset}, dense Jacobian and SVD": dense,
        f"{case.preset}, jacobian_norm": lambda e: (
            sensitivity.jacobian_norm(forward, e, key=keys.root(2), **shared).value
        ),
        f"{case.preset}, gradient_norm": lambda e: sensitivity.gradient_norm(forward, e, **shared),
    }
    results = harness.race(
        [harness.compile_program(fn, (embeddings,), name=name, items=case.prompts) for name, fn in programs.items()],
        rounds=case.rounds,
    )
    baseline, (spectral, gradient) = results[0]
    expected = ((spectral, gradient), spectral, gradient)
    for (record, found), reference in zip(results, expected, strict=True):
        ratio = harness.speedup(record, over=baseline)
        yield asdict(record) | {
            "over": baseline.name, "speedup": ratio.median, "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
            "value_error": harness.max_relative_error(found, reference),
        }  # fmt: skip
