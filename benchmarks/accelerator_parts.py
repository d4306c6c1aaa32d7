"""What :mod:`benchmarks.accelerator` measures, a generator of rows a part, the most wanted rows first.

``of_compute`` is a program's work over that of the fastest matrix product of its type in the same process, and
``of_bandwidth`` the bytes that XLA says its operations touch over the rate of a copy. Both count the body of a loop
once, so programs here take one step. Times are the least of a few calls, each until its results are ready.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench_profile, bench_sampler, bench_train_step, bench_tuning, cases, harness
from benchmarks.cases import TrainCase
from jaxsafety import keys, world
from jaxsafety.engine import sweep
from jaxsafety.linalg import svd, update_spaces
from jaxsafety.models import llama
from jaxsafety.models.gpt import Preset
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.study import lanes
from jaxsafety.study.checkpoints import program
from jaxsafety.types import Batch, Params, PreferenceBatch

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        preset: the GPT, of the paper's world.
        batches, seeds: sequences a step and seed, and seeds side by side.
        product: rows and columns of the matrix products that are the ceiling.
        copied: float32 numbers of the copy that is the ceiling of memory.
        draws: samples in one call.
        matrix: ``m n`` of the decomposition.
        pair: ``m n`` of one update beside its base, and how many such matrices a model has.
        matrices: of a model.
        model: the Llama that is tuned.
        tuned: sequences and tokens of one of its steps.
        steps: of every model of ``quick.yaml``.
    """

    preset: Preset
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    product: int
    copied: int
    draws: int
    matrix: tuple[int, int]
    pair: tuple[int, int]
    matrices: int
    model: LlamaConfig
    tuned: tuple[int, int]
    steps: int


_8B = LlamaConfig(128_256, 8192, 32, 32, 8, 4096, 14336, 128)
WHOLE = Sizes("paper", (512, 64), (1, 4, 8), 8192, 2**28, 2**17, (4096, 11008), (4096, 14336), 96, _8B, (8, 1024), 20)
SMALL = Sizes("tiny", (4,), (1, 2), 128, 2**16, 64, (64, 96), (32, 48), 6, cases.TUNED, (2, 16), 2)


def measured(
    what: str, function: Callable[..., Any], arguments: tuple[Any, ...], *, items: int, unit: str,
    ceiling: "Ceiling | None" = None, calls: int = 3,
) -> tuple[Row, Any]:  # fmt: skip
    """Returns the row of one compiled program, and its result."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    took = time.perf_counter() - started
    result = jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - started)
    least, stats, work = min(seconds), compiled.memory_analysis(), compiled.cost_analysis() or {}
    row = {"what": what, "rate": items / least, "unit": f"{unit}/s", "ms": 1e3 * least, "compile_s": took}
    if stats is not None:
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
        row["peak_mb"] = (held - stats.alias_size_in_bytes) / 1e6
    if ceiling is not None:
        row["of_compute"] = work.get("flops", 0.0) / least / ceiling.flops
        row["of_bandwidth"] = work.get("bytes accessed", 0.0) / least / ceiling.bytes
    return row, result


@dataclass(frozen=True)
class Ceiling:
    """The fastest float32 matrix product, in operations a second, and a copy, in bytes a second."""

    flops: float
    bytes: float


def ceilings(sizes: Sizes) -> Iterator[Row]:
    """Yields the rows of matrix products and of a copy; the last says what both are."""
    n, best = sizes.product, {}
    for dtype in ("float32", "bfloat16"):
        factors = [jax.random.normal(keys.root(seed), (n, n), dtype) for seed in range(2)]
        row, _ = measured(f"product {n} x {n}, {dtype}", jnp.matmul, tuple(factors), items=2 * n**3, unit="FLOP")
        best[dtype] = row["rate"]
        yield row
    numbers = jnp.arange(sizes.copied, dtype=jnp.float32)
    row, _ = measured("copy, read and written", lambda x: x + 1, (numbers,), items=8 * sizes.copied, unit="byte")
    about = {"device": harness.device(), "revision": harness.environment()["revision"], **harness.versions()}
    yield row | {"about": about, "ceiling": (best["float32"], row["rate"])}


def step(sizes: Sizes) -> Iterator[Row]:
    """Pretraining steps of the paper's model, batches drawn inside, by batch, type, seeds and strategy.

    ``error`` is of the losses, from those of the first program of as many sequences and seeds. Where a device refuses
    fused attention a row says so.
    """
    for row in ceilings(sizes):
        yield row
    ceiling = Ceiling(*row["ceiling"])
    wanted = [(batch, dtype, 1, "map") for batch in sizes.batches for dtype in bench_train_step.TYPES]
    wanted += [
        (batch, "float32", seeds, strategy)
        for seeds in sizes.seeds[1:]
        for batch in reversed(sizes.batches)
        for strategy in ("vmap", "map")
    ]
    losses: dict[tuple[int, int], np.ndarray] = {}
    for batch, dtype, seeds, strategy in wanted:
        function, arguments = _steps(sizes, batch, dtype, seeds, strategy)
        what = f"batch {batch}, {dtype}, {seeds} seed{'s' * (seeds > 1)}, {strategy}"
        try:
            row, (_, metrics) = measured(
                what, function, arguments, items=batch * seeds, unit="sequence", ceiling=ceiling if seeds == 1 else None
            )
        except Exception as refusal:  # jax's, XLA's or cuDNN's own kinds
            if "attention" not in bench_train_step.TYPES[dtype]:
                raise
            yield {"what": what, "note": f"{type(refusal).__name__}: {refusal}".splitlines()[0][:200]}
            continue
        expected = losses.setdefault((batch, seeds), np.asarray(metrics["loss"]))
        yield row | {"error": harness.max_relative_error(metrics["loss"], expected)}


def _steps(sizes: Sizes, batch: int, dtype: str, seeds: int, strategy: Any) -> tuple[Any, tuple[Any, ...]]:
    case = TrainCase("paper", "paper", sizes.preset, "sinusoidal", "adamw", batch, 1, (seeds,), 1)
    recipe = bench_train_step.recipe_of(case)
    subject = bench_train_step.opened(recipe, **bench_train_step.TYPES[dtype])
    start = bench_train_step.start_state(recipe, subject, seeds=seeds)
    (lane,) = recipe.lanes
    chunk = sweep.over_lanes(lanes.train_chunk(lambda _: subject, lane), strategy, seeds=seeds, per_lane=2)
    return chunk, (
        start,
        {},
        bench_train_step.first_seeds(recipe, seeds),
        bench_train_step.points(recipe),
        jnp.int32(1),
    )


def sampler(sizes: Sizes) -> Iterator[Row]:
    """Draws from the paper's world."""
    built = world.load("paper")
    for name in ("text", "pretrain", "unsafe"):
        draw = bench_sampler.draws(built, name, batch_size=sizes.draws)
        yield measured(f"paper {name}", draw, (keys.root(0),), items=sizes.draws, unit="sample")[0]


def linalg(sizes: Sizes) -> Iterator[Row]:
    """One large decomposition by every method, and an update beside its base; ``error`` is of the leading values."""
    m, n = sizes.matrix
    # Singular values fall as 1 / i, as an update's do: a product of two random matrices with such a diagonal.
    spread = 1.0 / jnp.arange(1, m + 1, dtype=jnp.float32)
    left, right = (jax.random.normal(keys.root(seed), (m, size)) for seed, size in ((0, m), (1, n)))
    matrices = jax.jit(lambda a, b: (a * spread[None]) @ b / m)(left, right)[None]
    rank = min(128, m // 4)
    reference = None
    for method in ("gram", "randomized", "full"):
        options = {"rank": rank, "key": keys.root(2)} if method == "randomized" else {}
        decomposed = partial(svd.decompose, method=method, **options)
        row, found = measured(f"{m} x {n}, {method}", decomposed, (matrices,), items=1, unit="matrix", calls=2)
        leading = np.asarray(found.values[0, : rank // 2])
        reference = leading if reference is None else reference
        yield row | {"error": float(np.max(np.abs(leading / reference - 1)))}
    m, n = sizes.pair
    base, delta = (jax.random.normal(keys.root(seed), (1, m, n)) / 64 for seed in range(2))
    both = partial(update_spaces.both_spaces, method="randomized", rank=rank, key=keys.root(2))
    row, _ = measured(f"update beside base, {m} x {n}", both, (base, delta), items=1, unit="matrix", calls=2)
    yield row
    yield {"what": f"all {sizes.matrices} of a model (a projection)", "ms": sizes.matrices * row["ms"],
           "note": "without reading them from a disk"}  # fmt: skip


def tuned(sizes: Sizes) -> Iterator[Row]:
    """Steps of an adapter on a model of random bfloat16 weights."""
    count, tokens = sizes.tuned
    make = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), llama.init(sizes.model, key=key)))
    params = make(keys.root(0))
    drawn = jax.random.randint(keys.root(1), (count, tokens + 1), 0, sizes.model.vocab_size)
    side = Batch(drawn[:, :-1], drawn[:, 1:], jnp.ones((count, tokens), bool))
    other, zeros = jax.tree.map(lambda leaf: leaf[::-1], side), jnp.zeros((count, tokens), jnp.float32)
    pairs = PreferenceBatch(side, other, jnp.zeros(count, bool), reference=(zeros, zeros))
    data = {"sft": (PreferenceBatch(side, None, pairs.unsafe), 1), "dpo": (pairs, 2)}
    # The leaner ones first: a cap cuts the others off.
    for stored in ("bfloat16", "float32"):
        for method, (examples, sides) in data.items():
            yield _adapter_step(sizes, method, params, examples, stored=stored, items=count * tokens * sides)


def _adapter_step(
    sizes: Sizes, method: str, params: Params, examples: PreferenceBatch, *, stored: str, items: int
) -> Row:
    count, tokens = sizes.tuned
    own = bench_tuning.job_of(
        method, rank=16, batch_size=count, max_tokens=tokens, dtype="bfloat16", stored_dtype=stored, accumulate=count,
        recompute=True,
    )  # fmt: skip
    state, frozen = program.start(params, own)
    run = partial(program.chunk(sizes.model, own), steps=jnp.int32(1))
    what = f"adapter, {method}, {count} x {tokens}, one at a time, activations in {stored}"
    row, (_, metrics) = measured(what, run, (state, frozen, examples, program.own(own)), items=items, unit="token")
    return row | {"note": f"loss {float(metrics['loss']):.4f}"}


def determinism(sizes: Sizes) -> Iterator[Row]:
    """Whether a few steps from one state give the same bits twice; ``error`` is how many numbers differ."""
    for strategy in ("map", "vmap"):
        function, arguments = _steps(sizes, sizes.batches[-1], "float32", sizes.seeds[-1], strategy)
        run = jax.jit(function)
        once, again = (jax.device_get(run(*arguments[:-1], jnp.int32(3))[0].params) for _ in range(2))
        differ = [np.sum(a != b) for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True)]
        yield {"what": f"three steps of {sizes.seeds[-1]} seeds, {strategy}, twice", "error": int(sum(differ))}


def profile(sizes: Sizes) -> Iterator[Row]:
    """Where a step's time goes, by kind of operation."""
    case = TrainCase("paper", "paper", sizes.preset, "sinusoidal", "adamw", sizes.batches[0], 2, (1,), 2)
    peak = max(row["rate"] for row in bench_profile.gemm_rows())
    for row in bench_profile.case_rows(case, peak=peak):
        yield {"what": row["name"], "ms": row["ms_per_step"], "note": f"{100 * row['share']:.1f} % of a chunk's step"}


def quick(sizes: Sizes) -> Iterator[Row]:
    """The demo's recipe at a few steps, from an empty compilation cache, as a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        steps = max(sizes.steps // 2, 1)
        words = ["run", "experiments/quick.yaml", "--out", Path(folder, "run"), "--compilation_cache",
                 Path(folder, "cache"), "--models.*.steps", sizes.steps, "--models.*.chunk_steps", steps]  # fmt: skip
        if sizes is SMALL:
            few = {"seeds": "[0]", "evaluate.prompts": 128, "evaluate.batch_size": 32, "analyze.prompts": 32,
                   "edits": "{}", "attacks": "{}", "analyses": "{verdicts: {}}"}  # fmt: skip
            words += [word for name, value in few.items() for word in (f"--{name}", value)]
        started = time.perf_counter()
        command = "import sys; from jaxsafety.cli.main import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", command, *map(str, words)], check=False, stdout=subprocess.PIPE)
        yield {"what": f"quick.yaml, {sizes.steps} steps a model", "ms": 1e3 * (time.perf_counter() - started),
               "note": f"exit code {done.returncode}"}  # fmt: skip


PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "step": step, "linalg": linalg, "llama": tuned, "sampler": sampler, "determinism": determinism,
    "profile": profile, "quick": quick,
}  # fmt: skip
