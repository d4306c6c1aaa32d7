"""Singular value decompositions and projections of matrices whose triplets are known, beside NumPy's and torch's.

The reference is the construction, in float64. ``value_error`` is the largest relative error of the judged leading
values; ``energy_error`` that of the reported energies (of random vectors in the leading output space; of vectors
inside and outside a matrix's output space); ``estimate`` is the largest error that a method itself reports of the
judged values, relative to the first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, harness
from benchmarks.cases import ProjectionCase, SVDCase, SVDProgram
from benchmarks.harness import Program
from jaxsafety import keys
from jaxsafety.linalg import subspace, svd, unbatched

COLUMNS = {
    "name": "program", "shape": "matrices", "median_ms": "median ms", "p10_ms": "p10", "p90_ms": "p90",
    "lower_ms": "lower ms", "compile_ms": "compile ms", "peak_mb": "peak MB", "speedup": "speed-up",
    "speedup_p10": "p10", "speedup_p90": "p90", "over": "over", "value_error": "value error", "estimate": "estimate",
    "energy_error": "energy error",
}  # fmt: skip

_TORCH_OVERSAMPLE = 10
_JUDGES = 64  # random vectors whose energy in the leading output space is compared


def run() -> Iterator[dict[str, Any]]:
    """Yields a row for each program: decompositions by case, then projections."""
    harness.say_missing("torch")
    for case in cases.SVD:
        yield from svd_rows(case)
    yield from projection_rows(cases.PROJECTION)


def svd_rows(case: SVDCase) -> Iterator[dict[str, Any]]:
    """Races a case's decompositions; a program returns leading values, output directions and error estimates."""
    spectrum = np.arange(1, min(case.shape[1:]) + 1) ** -case.decay
    matrices, outputs = known(case.shape, spectrum, directions=case.judged)
    names = [name for name in case.programs if harness.has("torch") or not name.startswith("torch")]
    programs = [svd_program(name, matrices, case=case) for name in names]
    vectors = np.random.default_rng(1).normal(size=(case.shape[0], _JUDGES, case.shape[2]))
    expected = _energies(vectors, outputs)

    def accuracy(output: Any) -> dict[str, Any]:
        values, directions, errors = output
        return {
            "value_error": largest_relative_error(values, np.broadcast_to(spectrum[: case.judged], values.shape)),
            "estimate": None if errors is None else float(np.max(np.asarray(errors) / np.asarray(values)[..., :1])),
            "energy_error": largest_relative_error(_energies(vectors, directions), expected),
        }

    results = harness.race(programs, rounds=case.rounds, warmups=case.warmups)
    yield from _rows(results, accuracy, shape=case.shape)


def svd_program(name: SVDProgram, matrices: np.ndarray, *, case: SVDCase) -> Program:
    """Returns the decomposition called ``name`` of float32 matrices ``[l, m, n]``."""
    if name == "numpy":
        return Program("numpy svd, float64", lambda: _judged(*np.linalg.svd(matrices, full_matrices=False), case=case))
    if name in ("torch", "torch_lowrank"):
        return Program(name.replace("_", " svd_"), _torch_svd(name, matrices, case=case))
    on_device = jnp.asarray(matrices)
    if name == "wide":
        plain = lambda a: _judged(*jnp.linalg.svd(a, full_matrices=False), case=case)  # noqa: E731
        return harness.compile_program(plain, (on_device,), name="jnp.linalg.svd, wide")

    def leading(a: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        found = svd.decompose(a, method=name, rank=case.rank, key=key)
        return found.values[..., : case.judged], found.outputs[..., : case.judged], found.errors[..., : case.judged]

    return harness.compile_program(leading, (on_device, keys.root(0)), name=name)


def _judged(_: Any, values: Any, right: Any, *, case: SVDCase) -> tuple[Any, Any, None]:
    return values[..., : case.judged], right[..., : case.judged, :].swapaxes(-1, -2), None


def _torch_svd(name: SVDProgram, matrices: np.ndarray, *, case: SVDCase) -> Callable[[], Any]:
    import torch

    given = torch.from_numpy(matrices)

    def whole() -> Any:
        return _judged(*torch.linalg.svd(given, full_matrices=False), case=case)

    def low_rank() -> Any:
        u, values, v = torch.svd_lowrank(given, q=case.rank + _TORCH_OVERSAMPLE, niter=case.power_iterations)
        return _judged(u, values, v.mT, case=case)

    return whole if name == "torch" else low_rank


def projection_rows(case: ProjectionCase) -> Iterator[dict[str, Any]]:
    """Races bases of the output spaces, each with the energies of vectors inside and outside them."""
    size = case.shape[1]
    matrices, outputs = known(case.shape, np.geomspace(1, 1 / case.condition, size), directions=size)
    vectors = _with_share_outside(outputs, case=case)
    single, basis = jnp.asarray(vectors, jnp.float32), jnp.asarray(outputs, jnp.float32)
    # Of the vectors as they are in float32.
    rounded = np.asarray(single, np.float64)
    within = _energies(rounded, outputs)
    across = np.sum((rounded - rounded @ outputs @ outputs.swapaxes(-1, -2)) ** 2, -1) / np.sum(rounded**2, -1)

    def numpy_energies() -> tuple[np.ndarray, np.ndarray]:
        right = np.linalg.svd(matrices, full_matrices=False)[2]
        unit = np.asarray(single) / np.linalg.norm(single, axis=-1, keepdims=True)
        coordinates = unit @ right.swapaxes(-1, -2)
        return np.sum(coordinates**2, -1), np.sum((unit - coordinates @ right) ** 2, -1)

    bases: dict[str, Callable[[jax.Array], jax.Array]] = {
        "projection, svd basis": lambda a: svd.decompose(a).outputs,
        "projection, qr basis": lambda a: unbatched.orthonormal(a.mT),
        "projection, gram basis": lambda a: svd.decompose(a, method="gram").outputs,
    }
    programs = [Program("projection, numpy svd, float64", numpy_energies)]
    for name, make in bases.items():
        both = partial(_both_energies, make)
        programs.append(harness.compile_program(both, (jnp.asarray(matrices), single), name=name))
    given = partial(_both_energies, lambda a: a)
    programs.append(harness.compile_program(given, (basis, single), name="projection, basis given"))

    def accuracy(output: Any) -> dict[str, Any]:
        pairs = zip(output, (within, across), strict=True)
        return {"energy_error": max(largest_relative_error(got, expected) for got, expected in pairs)}

    yield from _rows(harness.race(programs, rounds=case.rounds), accuracy, shape=case.shape)


def _both_energies(
    make: Callable[[jax.Array], jax.Array], matrices: jax.Array, vectors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    basis = make(matrices)
    return subspace.projection_energy(vectors, basis), subspace.complement_energy(vectors, basis)


def _with_share_outside(outputs: np.ndarray, *, case: ProjectionCase) -> np.ndarray:
    """Random vectors ``[l, v, n]`` with a share of their energy outside the outputs' span."""
    rng = np.random.default_rng(2)
    inside, outside = (rng.normal(size=(case.shape[0], case.vectors, case.shape[2])) for _ in range(2))
    inside = inside @ outputs @ outputs.swapaxes(-1, -2)
    outside -= outside @ outputs @ outputs.swapaxes(-1, -2)
    inside, outside = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (inside, outside))
    return np.sqrt(1 - case.outside) * inside + np.sqrt(case.outside) * outside


def known(
    shape: tuple[int, int, int], spectrum: np.ndarray, *, directions: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Makes matrices with a known spectrum and known directions, dense and without an SVD.

    The directions are columns of discrete Hartley matrices (orthogonal, and a fast Fourier transform away) under
    random signs of the entries, paired at random.

    Args:
        shape: ``l m n``.
        spectrum: ``[min(m, n)]`` values, descending.
        directions: how many leading output directions to return.
        seed: of signs and pairs.

    Returns:
        Matrices ``[l, m, n]`` in float32, and their leading output directions ``[l, n, directions]`` in float64.
    """
    rng = np.random.default_rng(seed)
    count, m, n = shape
    matrices = np.empty(shape, np.float32)
    outputs = np.empty((count, n, directions))
    for i in range(count):
        rows, columns = (rng.permutation(side)[: len(spectrum)] for side in (m, n))
        signs_in, signs_out = (rng.choice([-1.0, 1.0], side) for side in (m, n))
        core = np.zeros((m, n))
        core[rows, columns] = spectrum
        matrices[i] = signs_in[:, None] * _hartley(_hartley(core, axis=0), axis=1) * signs_out
        chosen = np.zeros((n, directions))
        chosen[columns[:directions], np.arange(directions)] = 1
        outputs[i] = signs_out[:, None] * _hartley(chosen, axis=0)
    return matrices, outputs


def _hartley(x: np.ndarray, *, axis: int) -> np.ndarray:
    transformed = np.fft.fft(x, axis=axis, norm="ortho")
    return transformed.real - transformed.imag


def _energies(vectors: np.ndarray, directions: Any) -> np.ndarray:
    return np.sum((vectors @ np.asarray(directions, np.float64)) ** 2, -1) / np.sum(vectors**2, -1)


def largest_relative_error(result: Any, reference: np.ndarray) -> float:
    """Returns the largest error of any entry, each relative to its own reference; the harness's is to the largest."""
    return float(np.max(np.abs(np.asarray(result, np.float64) / reference - 1)))


def _rows(
    results: Sequence[tuple[harness.Record, Any]], accuracy: Callable[[Any], dict[str, Any]], *, shape: Sequence[int]
) -> Iterator[dict[str, Any]]:
    baseline = results[0][0]
    for record, output in results:
        ratio = harness.speedup(record, over=baseline)
        yield asdict(record) | accuracy(output) | {
            "shape": " x ".join(map(str, shape)), "over": baseline.name, "speedup": ratio.median,
            "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
        }  # fmt: skip
